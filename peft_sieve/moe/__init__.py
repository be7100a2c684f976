"""What a Mixture-of-Experts layer is: finding it, and the grouped products inside it."""
