"""Accuracy of a video classifier, as a metric of the `evaluate` library that needs no network.

evaluate.load("examples/training/clip_accuracy.py").compute(predictions=scores, references=labels)
"""

import math

import datasets
import evaluate
import numpy as np


DESCRIPTION = """Top-1 accuracy and, of more than five classes, top-5 accuracy, with their 95 % intervals (Wilson's);
the mean over classes of the share of a class's clips that are recognised. Clips with the label -100 are left out."""


def wilson(right):
    """The 95 % interval of a share, from a boolean for each clip."""
    count, share, z = len(right), float(np.mean(right)), 1.96
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - spread), min(1.0, centre + spread)


class ClipAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: scores or logits, (clips, labels); references: label numbers, (clips,).",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        scores, labels = np.asarray(predictions), np.asarray(references)
        scores, labels = scores[labels != -100], labels[labels != -100]
        if len(labels) == 0:
            raise ValueError("There is no clip with a label: nothing to measure.")
        best = np.argsort(-scores, axis=-1, kind="stable")[:, :5]
        right = best[:, 0] == labels
        hits, results = {"accuracy": right}, {}
        if scores.shape[-1] > 5:
            hits["top5_accuracy"] = (best == labels[:, None]).any(-1)
        for name, each in hits.items():
            results[name] = float(each.mean())
            results[f"{name}_low"], results[f"{name}_high"] = wilson(each)
        means = [right[labels == label].mean() for label in np.unique(labels)]
        return {**results, "mean_class_accuracy": float(np.mean(means))}
