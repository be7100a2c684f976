"""What the router does: profiles, selection and statistics."""
