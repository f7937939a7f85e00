"""Runtime: what a compressed or deployed network needs to run.

`errata.compress` simulates with it, `errata.deploy` runs artifacts on it. It imports nothing of errata but
the front door, and neither brevitas nor anything that only compressing needs.
"""

# Import its modules by name: loading all of them here would make each of them as slow as the slowest.
__all__: list[str] = []
