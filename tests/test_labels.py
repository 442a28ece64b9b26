"""Labels and losses of the classifiers: their kinds, their numbers, what is refused, and gradient accumulation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForVideoClassification, Trainer, TrainingArguments

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification
from modeling_videomamba.loss_videomamba import classification_loss


ROOT = Path(__file__).resolve().parent.parent

KINDS = ["single_label_classification", "multi_label_classification", "regression"]


def tiny_model(seed=0, **fields):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 32, "num_frames": 4, "num_labels": 3}
    return VideoMambaForVideoClassification(VideoMambaConfig(**size | {"scan_backend": "torch"} | fields))


def clips_and_labels(kind, count=8):
    torch.manual_seed(1)
    clips, numbers = torch.randn(count, 4, 3, 32, 32), torch.rand(count, 3)
    labels = {
        KINDS[0]: torch.tensor([2, 0, 1, -100, 2, 2, 0, 1])[:count],
        KINDS[1]: (numbers > 0.5).float(),
        KINDS[2]: 4 * numbers,
    }
    labels[KINDS[1]][3:4] = -100  # a clip that could not be read
    return clips, labels[kind]


def expected_step(kind):
    """The loss of all clips and its gradients, by PyTorch's own losses."""
    model, (clips, labels) = tiny_model(), clips_and_labels(kind)
    logits = model(clips).logits
    if kind == KINDS[1]:
        logits, labels = (part[(labels != -100).all(1)] for part in (logits, labels))
    loss = dict(zip(KINDS, (F.cross_entropy, F.binary_cross_entropy_with_logits, F.mse_loss), strict=True))[kind](
        logits, labels
    )
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def train_one_step(kind, folder, batch_size, accumulation):
    """A stock `Trainer`, whose weights go down by the gradient. Returns the loss in its log and the gradients."""
    model, (clips, labels) = tiny_model(problem_type=kind), clips_and_labels(kind)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
        **{"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation},
        **{"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
        **{"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False},
    )
    rows = [{"pixel_values": clip, "labels": label} for clip, label in zip(clips, labels, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    gradients = {name: before[name] - weight.detach() for name, weight in model.named_parameters()}
    return trainer.state.log_history[0]["loss"], gradients


def assert_same_step(found, kind):
    loss, gradients = expected_step(kind)
    assert found[0] == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_are_one_large_batch(kind, tmp_path):
    for batch_size, accumulation in ((8, 1), (2, 4)):
        assert_same_step(train_one_step(kind, tmp_path, batch_size, accumulation), kind)


@pytest.mark.slow
def test_accumulated_batches_of_two_processes_are_one_large_batch(python, tmp_path):
    code = """
import sys, torch
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from test_labels import KINDS, train_one_step
steps = {kind: train_one_step(kind, folder, batch_size=2, accumulation=2) for kind in KINDS}
if torch.distributed.get_rank() == 0:
    torch.save(steps, f"{folder}/steps.pt")
torch.distributed.barrier()
"""
    python.run_together(2, ["-c", code, tmp_path, Path(__file__).parent], tmp_path)
    for kind, step in torch.load(tmp_path / "steps.pt", weights_only=True).items():
        assert_same_step(step, kind)


def test_a_config_that_asks_for_hidden_states_does_not_spoil_the_evaluation(tmp_path):
    """The Trainer gathers all that a model puts out, and would hand a tuple to the metric."""
    model, (clips, labels) = tiny_model(output_hidden_states=True), clips_and_labels(KINDS[0])
    rows = [{"pixel_values": clip, "labels": label} for clip, label in zip(clips, labels, strict=True)]
    assert model(clips).hidden_states is not None
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    found = Trainer(model, arguments).predict(rows).predictions
    torch.testing.assert_close(torch.from_numpy(found), model(clips).logits.detach())


@pytest.mark.parametrize(
    "fields, labels, kind",
    [
        ({}, torch.tensor([1, 2]), None),  # no word about it in the config: a later training may use it otherwise
        ({}, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), "multi_label_classification"),
        ({}, torch.tensor([[True, False, True], [False, False, False]]), "multi_label_classification"),
        ({"num_labels": 1}, torch.tensor([0.5, 7.0]), "regression"),
        ({"num_labels": 1}, torch.tensor([1, 7]), "regression"),
        ({"problem_type": "regression"}, torch.tensor([[1, 2, 3], [4, 5, 6]]), "regression"),
    ],
)
def test_the_kind_follows_from_the_labels(fields, labels, kind):
    """As in transformers' own classifiers; pipelines ask the config for a sigmoid or none."""
    model = tiny_model(**fields)
    assert model(torch.randn(2, 4, 3, 32, 32), labels=labels).loss.isfinite()
    assert model.config.problem_type == kind


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        (None, [0, 1], "`labels` is a list, but must be a tensor"),
        (
            None,
            torch.tensor([0, 3]),
            r"`labels` has \[3\], but they must be from 0 to 2, as the model has 3 labels, or -100",
        ),
        (None, torch.tensor([0, -1]), r"`labels` has \[-1\]"),
        (None, torch.tensor([0, 1, 2]), r"int64 of shape \(3,\), but 2 clips with a label each .* of shape \(2,\)"),
        (None, torch.tensor([0.0, 1.0]), r"float32 of shape \(2,\), but 2 clips with 3 outputs .*\(2, 3\)"),
        (KINDS[0], torch.zeros(2, 3), r"float32 of shape \(2, 3\), but 2 clips with a label each.*problem_type"),
        (KINDS[1], torch.tensor([0, 1]), r"int64 of shape \(2,\), but 2 clips with 3 outputs .*problem_type"),
        (KINDS[1], torch.full((2, 3), 2.0), r"`labels` has \[2.0, .*\], but they must be numbers from 0 to 1"),
        (KINDS[1], torch.full((2, 3), float("nan")), "must be numbers from 0 to 1"),
        (KINDS[2], torch.full((2, 3), float("inf")), r"`labels` has \[inf, .*\], but they must be finite numbers"),
        (KINDS[2], torch.zeros(2), r"float32 of shape \(2,\), but 2 clips with 3 outputs"),
        (KINDS[0], torch.tensor([0, 1]).to_sparse(), r"`labels` must be dense, got the layout torch.sparse_coo: call"),
        (KINDS[1], torch.ones(2, 3).to_sparse(), r"`labels` must be dense, got the layout torch.sparse_coo: call"),
        (KINDS[0], torch.tensor([0, 1], device="meta"), "`labels` is on the device meta.* on the model's device"),
    ],
)
def test_labels_that_cannot_be_are_named(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(problem_type=kind)(torch.randn(2, 4, 3, 32, 32), labels=labels)


class Assertions(TorchDispatchMode):
    """What is left for a GPU to find out. A fake tensor of a GPU cannot be looked at: each try is an error."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._assert_async.msg:
            self.messages.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        (KINDS[0], torch.tensor([0, 1]), "`labels` must be from 0 to 2, as the model has 3 labels, or -100"),
        (KINDS[1], torch.zeros(2, 3), "`labels` must be numbers from 0 to 1"),
        (KINDS[2], torch.zeros(2, 3), "`labels` must be finite numbers"),
    ],
)
def test_labels_on_a_gpu_are_checked_without_waiting(kind, labels, message):
    """Of a GPU that is not there: shapes, types and devices, no numbers."""
    config = VideoMambaConfig(problem_type=kind, num_labels=3)
    with FakeTensorMode() as fake, Assertions() as found:
        labels = fake.from_tensor(labels).to("cuda")
        with pytest.raises(DataDependentOutputException):
            bool((labels == 0).all())
        loss = classification_loss(labels, torch.empty(2, 3, device="cuda"), config)
    assert loss.shape == () and len(found.messages) == 1 and found.messages[0].startswith(message)


@pytest.mark.gpu
@pytest.mark.parametrize("kind, labels", [(KINDS[0], "[0, 3]"), (KINDS[1], "[[0.0, 0.5, 2.0]] * 2")])
def test_labels_on_a_gpu_out_of_range_are_named(kind, labels):
    """In a process of its own: the assertion ends the process's work on the GPU, at this or a later call."""
    code = f"""
import torch
from modeling_videomamba import VideoMambaConfig
from modeling_videomamba.loss_videomamba import classification_loss
logits = torch.zeros(2, 3, device="cuda", requires_grad=True)
classification_loss(torch.tensor({labels}, device="cuda"), logits, VideoMambaConfig(problem_type={kind!r}))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "`labels` must be " in done.stderr


def test_the_kind_of_problem_is_forgotten_with_the_number_of_labels(tmp_path):
    """Not so if it is given, or if the labels have other names only."""
    tiny_model(problem_type="single_label_classification").save_pretrained(tmp_path)

    def kind(**options):
        model = AutoModelForVideoClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **options)
        assert model.classifier.out_features == model.config.num_labels
        return model.config.problem_type

    assert kind() == kind(id2label={0: "a", 1: "b", 2: "c"}) == "single_label_classification"
    assert kind(num_labels=1) is None and kind(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}) is None
    assert kind(problem_type=KINDS[1], num_labels=5) == kind(num_labels=5, problem_type=KINDS[1]) == KINDS[1]
    config = VideoMambaConfig.from_pretrained(tmp_path)
    config.num_labels = 7
    assert config.problem_type is None

    # One label: what is trained, saved and loaded is a regression.
    model = AutoModelForVideoClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, num_labels=1)
    assert model(torch.randn(2, 4, 3, 32, 32), labels=torch.tensor([3.0, 5.0])).loss > 1
    model.save_pretrained(tmp_path / "one")
    assert AutoModelForVideoClassification.from_pretrained(tmp_path / "one").config.problem_type == "regression"


def test_label_numbers_may_be_text(tmp_path):
    """`id2label[str(i)]`, as transformers' guide to video classification writes them."""
    names = ["archery", "bowling", "crawling"]
    label2id = {name: str(number) for number, name in enumerate(names)}
    id2label = {number: name for name, number in label2id.items()}
    right = (dict(enumerate(names)), {name: number for number, name in enumerate(names)})
    tiny_model().save_pretrained(tmp_path)
    given = AutoModelForVideoClassification.from_pretrained(tmp_path, id2label=id2label, label2id=label2id).config
    made = VideoMambaConfig(id2label=id2label, label2id=label2id)
    changed = VideoMambaConfig(num_labels=3)
    changed.id2label, changed.label2id = id2label, label2id
    for config in (given, made, changed):
        assert (config.id2label, config.label2id) == right


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"id2label": ["a", "b", "c"]}, "`id2label` is a list, but must be a dict|Field 'id2label' with value"),
        ({"id2label": {"a": 0}}, "`id2label` must number the labels by integers|Field 'id2label' with value {'a': 0}"),
        ({"dtype": "float99"}, "`dtype` is 'float99', but must name a type of PyTorch"),
        ({"time_step_max": float("inf")}, "`time_step_max` < inf"),
    ],
)
def test_fields_that_cannot_be_are_named(fields, message, tmp_path):
    """In the constructor, in a call of `from_pretrained`, and in the file."""
    error = pytest.raises((ValueError, StrictDataclassError), match=message)
    with error:
        VideoMambaConfig(**fields)
    tiny_model().save_pretrained(tmp_path)
    with error:
        AutoModelForVideoClassification.from_pretrained(tmp_path, **fields)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | fields))
    with error:
        AutoModelForVideoClassification.from_pretrained(tmp_path)
