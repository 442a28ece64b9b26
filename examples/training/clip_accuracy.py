"""Accuracy of a video classifier, as a metric of the `evaluate` library that needs no network.

evaluate.load("examples/training/clip_accuracy.py").compute(predictions=scores, references=labels)
"""

import math

import datasets
import evaluate
import numpy as np


DESCRIPTION = """Top-1 accuracy with its 95 % interval (Wilson's), top-5 accuracy, and the mean over classes of the
share of a class's clips that are recognised. Clips with the label -100 are left out."""


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
        count, z = len(labels), 1.96
        if count == 0:
            raise ValueError("There is no clip with a label: nothing to measure.")
        best = np.argsort(-scores, axis=-1, kind="stable")[:, :5]
        right = best[:, 0] == labels
        share = float(right.mean())
        centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        spread = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
        return {
            "accuracy": share,
            "accuracy_low": centre - spread,
            "accuracy_high": centre + spread,
            "top5_accuracy": float((best == labels[:, None]).any(-1).mean()),
            "mean_class_accuracy": float(np.mean([right[labels == label].mean() for label in np.unique(labels)])),
        }
