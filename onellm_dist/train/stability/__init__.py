"""Stability of training: spikes, values that are not finite, and the samples behind them."""
