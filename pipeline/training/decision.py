"""The weight of an answer's first token in the loss, for either backend."""

from typing import Any


def weigh_decision(model: Any, weight: float) -> None:
    """Multiply the gradient of the loss on each answer's first token by `weight`; `model` is PEFT's.

    The output head is frozen, so to scale the gradient at the hidden state that predicts a token is to scale the loss
    on that token, whatever computes it (TRL's chunks, Unsloth's fused kernel). A step's loss stays divided by the
    number of its answers' tokens, so micro-batches and cards do not matter. The logged loss is without the weight.
    """
    import torch

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weights: Any) -> Any:
            ctx.save_for_backward(weights)
            return hidden.view_as(hidden)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            (weights,) = ctx.saved_tensors
            return gradient * weights.unsqueeze(-1).to(gradient.dtype), None

    labels: list[Any] = []

    def remember(_: Any, __: Any, given: dict[str, Any]) -> None:
        labels[:] = [given.get("labels")]

    def scale(_: Any, __: Any, output: Any) -> Any:
        if labels[0] is not None and torch.is_grad_enabled():
            learned = labels[0] != -100  # (rows, tokens)
            first = learned[:, 1:] & ~learned[:, :-1]
            # The state at i - 1 predicts token i. An example does not begin with its answer.
            weights = torch.nn.functional.pad(torch.where(first, weight, 1.0), (0, 1), value=1.0)
            output.last_hidden_state = Scale.apply(output.last_hidden_state, weights)
        return output

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_base_model().model.register_forward_hook(scale)
