"""Robustness curves: R(t), the share of points whose smallest adversarial perturbation has norm at most t.

The package works on distances, margins and 8-bit images; networks and attacks are passed in.
"""
NORMS = ("linf", "l2", "l1")
