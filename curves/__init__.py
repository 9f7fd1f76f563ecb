"""Robustness curves: R(t), the share of points whose smallest adversarial perturbation has norm at most t, and what follows from them.

The package works on distances, margins and 8-bit images; models, attacks and losses are passed in. Norms are called linf, l2 and l1.
"""
