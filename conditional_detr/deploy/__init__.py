"""Models made ready to run: optimised in memory."""

from conditional_detr.deploy.optimize import optimize

__all__ = ["optimize"]
