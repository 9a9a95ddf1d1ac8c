"""What differs where an algorithm is a Ray Tune trial."""
