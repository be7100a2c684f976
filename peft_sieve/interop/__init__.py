"""What leaves the package: model cards."""
