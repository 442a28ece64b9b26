"""Clips with several labels each: lists of labels in the data, their loss and their metrics."""

from types import SimpleNamespace

import numpy as np
import torch
from datasets import ClassLabel, List, Value

from modeling_videomamba.loss_videomamba import classification_loss


IGNORED = -100  # the label of a clip that could not be read; losses and metrics leave it out


def has_several(clips):
    """Whether the column `label` holds a list for each clip."""
    return not isinstance(clips.features["label"], ClassLabel)


def is_text(kind):
    """Whether a column's lists hold names, not numbers."""
    return isinstance(getattr(kind, "feature", None), Value) and "string" in kind.feature.dtype


def labels_that_occur(clips):
    """The `set` of all labels in lists."""
    return {label for labels in clips["label"] for label in labels or [] if label is not None}


def number_labels(clips, names):
    """The clips with lists of numbers in place of lists of names."""
    if unknown := sorted(labels_that_occur(clips) - set(names)):
        raise ValueError(f"The clips have labels {unknown}, but the training clips have only {names}.")
    return clips.cast_column("label", List(ClassLabel(names=names)))


def multi_hot(labels, count):
    """A list of label numbers as float32 (count,): 1 for these, else 0. -100 throughout if `labels` is that number."""
    if labels == IGNORED:
        return torch.full((count,), float(IGNORED))
    if any(label is None or not 0 <= label < count for label in labels or []):
        raise ValueError(f"A clip has the labels {labels}, of which each must be a number from 0 to {count - 1}.")
    vector = torch.zeros(count)
    vector[labels or []] = 1
    return vector


def encode_label(label, num_labels):
    """What a model is given of a clip's label: itself, or `multi_hot` of a list; then `num_labels` is given."""
    return label if num_labels is None else multi_hot(label, num_labels)


def multi_label_loss(outputs, labels, num_items_in_batch=None):
    """For a `Trainer`, of any architecture: binary cross-entropy, without clips that could not be read."""
    logits, kind = outputs["logits"], SimpleNamespace(problem_type="multi_label_classification")
    return classification_loss(labels, logits.float(), kind, num_items_in_batch)


def refuse_smoothing(several, factor):
    if several and factor:
        raise ValueError(
            f"--label_smoothing_factor {factor} is for one label a clip, but these clips have lists of labels. Set it "
            "to 0."
        )


def average_precision(relevant, scores):
    """
    Of one ranking, as scikit-learn's `average_precision_score`: the precision down to each distinct score, weighted by
    the share of the relevant that has exactly this score.

    Args:
        relevant (`np.ndarray`): booleans (n,), at least one of them true.
        scores (`np.ndarray`): (n,), the more the sooner.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(ranked[1:] != ranked[:-1], True)  # of equal scores none comes before the other
    found = np.cumsum(relevant[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / found[-1])


def precisions(scores, labels):
    """
    The metrics of clips with several labels each.

    Args:
        scores (`np.ndarray`): logits or probabilities, (clips, labels).
        labels (`np.ndarray`): 0 or 1, (clips, labels); clips with -100 are left out.

    Returns:
        `dict`: `mean_average_precision` (mAP, macro), the mean of the average precisions of the labels that some clip
        has (scikit-learn counts 0 for the others, and warns); how many these are, `measured_labels`; and
        `micro_average_precision`, of all pairs of clip and label in one ranking.

    Raises:
        ValueError: no clip has a label, or a score is NaN.
    """
    known = (labels != IGNORED).all(-1)
    scores, relevant = scores[known], labels[known] > 0.5
    if not relevant.any():
        raise ValueError("There is no clip with a label: nothing to measure.")
    if np.isnan(scores).any():
        raise ValueError("Some scores are NaN: the training has diverged. Lower --learning_rate.")
    each = [average_precision(relevant[:, i], scores[:, i]) for i in np.flatnonzero(relevant.any(0))]
    return {
        "mean_average_precision": float(np.mean(each)),
        "micro_average_precision": average_precision(relevant.ravel(), scores.ravel()),
        "measured_labels": len(each),
    }
