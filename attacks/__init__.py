"""Attacks: pure functions (model, x, target, *, ...) -> x_adv that leave the model as they found it."""
