"""The search for the best correction plan within a budget. Use it as `errata.correct.plan`.

This file imports nothing, because a plan holds an `errata.correct.planner.expectation.Expectation`.
"""
