"""Chooses the correction plan that buys most within a budget. `errata.correct.plan` is the way in.

Nothing is imported here, because a plan holds an `errata.correct.planner.expectation.Expectation`.
"""
