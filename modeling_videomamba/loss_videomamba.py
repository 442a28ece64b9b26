"""The loss of VideoMamba's classifiers."""

import torch
import torch.nn.functional as F


def classification_loss(labels, logits, config, num_items_in_batch=None, **kwargs):
    """
    The mean loss of a batch: what kind, `config.problem_type` says.

    Without it, one output is for regression, integers are for a label a clip, and other numbers for several labels a
    clip. The last two kinds are then noted in the config, because pipelines ask there what the logits mean.

    Args:
        labels (`torch.Tensor`):
            - `"single_label_classification"`: integers (B,), -100 for a clip that does not count. Cross-entropy.
            - `"multi_label_classification"`: numbers from 0 to 1, (B, num_labels), -100 where a label of a clip does
              not count. Binary cross-entropy.
            - `"regression"`: finite numbers (B, num_labels), or (B,) for one output. Mean squared error.
        logits (`torch.Tensor`): (B, num_labels).
        config (`VideoMambaConfig`): for `problem_type`.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Over how many labels the mean goes: those of all batches of an optimizer step, as the `Trainer` counts
            them. By default, those of this batch.

    Returns:
        `torch.Tensor`: a scalar, differentiable in the logits.

    Raises:
        ValueError: for labels of another type, shape or range. On a GPU, a wrong range ends the process's work there
            with an assertion whose message says so: for a look at the labels, each training step would wait. While a
            model is compiled, the range is not checked.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` is a {type(labels).__name__}, but must be a tensor.")
    if labels.layout != torch.strided:
        raise ValueError(f"`labels` must be dense, got the layout {labels.layout}: call `to_dense()`.")
    if labels.is_meta and not logits.is_meta:
        raise ValueError("`labels` is on the device meta, and so holds no labels. Make it on the model's device.")
    kind = config.problem_type
    if kind is None:
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        single = "single_label_classification" if whole else "multi_label_classification"
        kind = "regression" if logits.shape[-1] == 1 else single
    labels = _checked_labels(labels.to(logits.device), logits, kind)
    loss_of = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": _multi_label_loss,
        "regression": F.mse_loss,
    }[kind]
    if config.problem_type is None and kind != "single_label_classification":
        config.problem_type = kind
    if num_items_in_batch is None:
        return loss_of(logits, labels)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return loss_of(logits, labels, reduction="sum") / num_items_in_batch


def _multi_label_loss(logits, labels, reduction="mean"):
    counted = labels != -100
    targets, weight = labels.clamp(min=0), counted.to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="sum")
    return loss if reduction == "sum" else loss / counted.sum().clamp(min=1)


def labelled_steps(labels, logits, config):
    """
    The labels and logits that [`classification_loss`] compares, of a model with logits after each step in time.

    Args:
        labels (`torch.Tensor`): of each step, `(B, n_t)` or `(B, n_t, num_labels)`; else those of clips.
        logits (`torch.Tensor`): `(B, n_t, num_labels)`.
        config (`VideoMambaConfig`): for `problem_type`.

    Returns:
        both with one axis less, the steps among the batch; or the labels, and the logits after the last step.
    """
    if isinstance(labels, torch.Tensor):
        single = config.problem_type == "single_label_classification"
        if config.problem_type is None:
            single = not labels.is_floating_point() and labels.dtype != torch.bool
        numbers = logits.shape[:2] if single or logits.shape[2] == 1 else None
        if labels.shape in (logits.shape, numbers):
            return labels.flatten(0, 1), logits.flatten(0, 1)
    return labels, logits[:, -1]


def _checked_labels(labels, logits, kind):
    """The labels as the loss function of this kind takes them."""
    batch, count = logits.shape
    found = f"`labels` is {labels.dtype} of shape {tuple(labels.shape)}"
    hint = "Set `config.problem_type` if they are of another kind."
    if kind == "single_label_classification":
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not whole or labels.shape not in ((batch,), (batch, 1)):
            raise ValueError(
                f"{found}, but {batch} clips with a label each ({kind!r}) need integers of shape ({batch},). {hint}"
            )
        labels = labels.flatten().long()
        _require(
            ((labels >= 0) & (labels < count)) | (labels == -100),
            labels,
            f"must be from 0 to {count - 1}, as the model has {count} labels, or -100 for a clip that does not count. "
            "Load the model with the right `num_labels`.",
        )
        return labels
    one = (batch,) if count == 1 and kind == "regression" else None
    if labels.is_complex() or labels.shape not in ((batch, count), one):
        raise ValueError(
            f"{found}, but {batch} clips with {count} outputs ({kind!r}) need numbers of shape ({batch}, {count}). "
            f"{hint}"
        )
    labels = labels.reshape(batch, count).to(logits.dtype)
    if kind == "multi_label_classification":
        right = ((labels >= 0) & (labels <= 1)) | (labels == -100)
        _require(right, labels, f"must be numbers from 0 to 1, or -100 for one that does not count ({kind!r}). {hint}")
    else:
        _require(labels.isfinite(), labels, f"must be finite numbers ({kind!r}). Leave such clips out.")
    return labels


def _require(right, labels, wanted):
    """That `right` is true for each number of `labels`. A GPU finds out by itself: nobody waits for the answer."""
    if torch.compiler.is_compiling():
        return
    if labels.device.type == "cuda":
        torch._assert_async(right.all(), f"`labels` {wanted}")
    elif labels.device.type == "cpu" and not right.all():
        raise ValueError(f"`labels` has {labels[~right].tolist()[:8]}, but they {wanted}")
