"""Runtime: what a compressed or deployed network needs to run.

`errata.compress` simulates with it, `errata.deploy` runs artifacts on it. It imports nothing of errata but
the front door, and neither brevitas nor anything that only compressing needs.
"""
