"""What a Mixture-of-Experts layer is: finding it, how it lays out its experts, where and how it stores them."""
