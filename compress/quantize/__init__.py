"""Low bits simulated: which layers, which ranges, and the cheap steps that pay."""
