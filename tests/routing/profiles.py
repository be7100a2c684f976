"""Small profiles."""

from peft_sieve import RoutingProfile

ANY_SCORE = ("uniform", "greedy", "coverage", "random")  # strategies which any score can be used with


def profile_of(*rows, mass=None, **options) -> RoutingProfile:
    return RoutingProfile.from_arrays(list(rows), mass, **options)
