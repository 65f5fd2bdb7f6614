"""Exports that share what takes long."""

from conditional_detr.deploy.export import trace


class OneTrace:
    """Stand-in for ``trace``, which traces a model once for all exports in a dtype; they leave the trace as it is."""

    def __init__(self):
        self.traces = {}

    def __call__(self, model, *, dtype, top_k):
        weights = tuple(tensor.double().sum().item() for tensor in model.state_dict().values())
        key = model.config, model.metadata, weights, dtype, top_k
        if key not in self.traces:
            self.traces[key] = trace(model, dtype=dtype, top_k=top_k)
        return self.traces[key]
