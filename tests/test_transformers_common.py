"""transformers' own tests of a model, a configuration and processors, run on VideoMamba.

They are taken from the source distribution of the installed transformers (see transformers_sources.py). What is here
is only what each model of transformers has to give them: small instances, inputs and expected shapes.

Of the mixins that the distribution holds, these are left out:
  - `test_fsdp_mixin`, `test_tensor_parallel_mixin` and `test_expert_parallel_mixin` need a module that it leaves out
    (`distributed_testing_utils`), make language models, and run for a list of model types alone. Sharded training is
    tested in test_modeling_sharded.py; there is no plan for tensor parallelism, and there are no experts.
  - `test_memory_cleanup_mixin` holds no test: it frees what integration tests of checkpoints on the Hub leave behind.
  - `test_backbone_common` and `test_decision_head_common` are for classes that VideoMamba does not have, all others
    for text and sound.
"""

import fnmatch
import tempfile
import unittest
from unittest import mock

import PIL.Image
import pytest
import torch
from transformers import VideoClassificationPipeline, pipeline
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

import modeling_videomamba
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaImageProcessor,
    VideoMambaModel,
    VideoMambaVideoProcessor,
)
from modeling_videomamba.modeling_videomamba import VideoMambaPatchEmbeddings
from transformers_sources import SourcesUnavailable, load
from video_files import write_video


# The tests that do not apply to VideoMamba: why, and their names. What needs hardware or a package that is not there
# skips itself, with the reason.
NOT_APPLICABLE = {
    "VideoMamba has no attention": (
        "test_attention_outputs",
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically*",
        "test_eager_matches_*",
        "test_flash_attn_*",
        "test_flex_attention_*",
        "test_sdpa_can_*",
        "test_sliding_window_mask",
    ),
    "VideoMamba has no rotary position embeddings": ("test_model_rope_*", "test_vision_axial_rope"),
    "VideoMamba has no vocabulary": (
        "test_inputs_embeds*",
        "test_resize_embeddings_*",
        "test_resize_position_vector_embeddings",
        "test_resize_tokens_*",
    ),
    "VideoMamba is not a language model": (
        "test_causal_lm_loss_honors_shift_labels",
        "test_encoder_decoder_loss_no_double_shift",
        "test_torch_compile_for_training",
    ),
    "VideoMamba has no experts": ("test_moe_models_*", "test_output_router_logits_*"),
    "VideoMamba's cache is its own and had no other name": ("test_bc_cache_name_forward",),
    "VideoMamba has no plan for tensor parallelism": ("test_tied_head_has_a_tp_plan_entry", "test_tp_plan_*"),
    "VideoMamba's configuration has no configurations inside": ("test_internal_model_config_and_subconfig_are_same",),
    "VideoMamba's parameters may all have the type that is asked for": ("test_keep_in_fp32_modules*",),
    "VideoMamba was never saved under other names": (
        "test_can_load_from_already_mapped_keys",
        "test_reverse_loading_mapping",
    ),
    "VideoMamba's image processor has one backend, torchvision": (
        "test_backends_equivalence*",
        "test_pil_can_run_without_torchvision",
        "test_save_load_backends*",
    ),
    "The base classes check arguments by their types, not by a list of names": (
        "test_image_processor_preprocess_arguments",
        "test_video_processor_preprocess_arguments",
    ),
    "The base classes keep sizes in a SizeDict, which the test does not take": (
        "test_override_instance_attributes_does_not_affect_other_instances",
    ),
}


class VideoClassificationPipelineTests:
    """A task's own tests, as PipelineTesterMixin asks for them; the distribution leaves them out."""

    def get_test_pipeline(self, model, tokenizer, image_processor, dtype):
        self.folder = tempfile.TemporaryDirectory()
        examples = [write_video(f"{self.folder.name}/{n}.mp4", frames=n) for n in (9, 30)]
        self.from_frames = VideoClassificationPipeline(model=model, image_processor=image_processor, dtype=dtype)
        return pipeline("video-classification", model=model.name_or_path, dtype=dtype), examples

    def run_pipeline_test(self, from_files, examples):
        labels = set(from_files.model.config.id2label.values())
        for classifier in (from_files, self.from_frames):
            for answers in classifier(examples, top_k=2):
                assert len(answers) == 2
                assert {answer["label"] for answer in answers} <= labels
                assert 1 >= answers[0]["score"] >= answers[1]["score"] >= 0
        assert from_files(examples[0], top_k=2) == from_files(examples, top_k=2)[0]


class ImageClassificationPipelineTests:
    def get_test_pipeline(self, model, tokenizer, image_processor, dtype):
        pictures = [PIL.Image.new("RGB", (40, 30), "red"), PIL.Image.new("L", (20, 50), 200)]
        return pipeline("image-classification", model=model.name_or_path, dtype=dtype), pictures

    def run_pipeline_test(self, classifier, examples):
        labels = set(classifier.model.config.id2label.values())
        for answers in classifier(examples, top_k=2, batch_size=2):
            assert len(answers) == 2
            assert {answer["label"] for answer in answers} <= labels
            assert 1 >= answers[0]["score"] >= answers[1]["score"] >= 0


try:
    modeling_common, configuration_common, image_common, video_common, pipeline_common, training_common = load(
        "test_modeling_common",
        "test_configuration_common",
        "test_image_processing_common",
        "test_video_processing_common",
        "test_pipeline_mixin",
        "test_training_mixin",
        pipelines={
            "ImageClassificationPipelineTests": ImageClassificationPipelineTests,
            "VideoClassificationPipelineTests": VideoClassificationPipelineTests,
        },
    )
except SourcesUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)


def skip_not_applicable(test_class):
    for reason, patterns in NOT_APPLICABLE.items():
        for pattern in patterns:
            for name in fnmatch.filter(dir(test_class), pattern):
                setattr(test_class, name, unittest.skip(reason)(getattr(test_class, name)))
    return test_class


class VideoMambaModelTester:
    """A small configuration and inputs, by the names the mixin reads."""

    is_training = True
    batch_size = 3
    num_frames = 4
    tubelet_size = 2
    image_size = 16
    hidden_size = 32
    num_hidden_layers = 2
    merge_layers = [1]  # the hidden states that the mixin measures come before
    seq_length = 1 + 2 * 2 * 2  # the class token, and the tubelets in time, height and width

    def get_config(self):
        return VideoMambaConfig(
            image_size=self.image_size,
            patch_size=8,
            num_frames=self.num_frames,
            tubelet_size=self.tubelet_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            merge_layers=self.merge_layers,
            state_size=8,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_frames, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling_common.floats_tensor(shape)}


@skip_not_applicable
class VideoMambaModelTest(modeling_common.ModelTesterMixin, pipeline_common.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (VideoMambaModel, VideoMambaForVideoClassification)
    pipeline_model_mapping = {"video-classification": VideoMambaForVideoClassification}
    has_attentions = False
    model_tester_class = VideoMambaModelTester
    # The mixin reads a model's year from a copyright line and runs this test for those after 2022 only.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.config_tester = configuration_common.ConfigTester(
            self,
            config_class=VideoMambaConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers"],
            hidden_size=32,
        )
        # The mixin tells models without a head by transformers' own table, which registering does not change.
        table = mock.patch.dict(modeling_common.MODEL_MAPPING_NAMES, videomamba=VideoMambaModel.__name__)
        table.start()
        self.addCleanup(table.stop)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_problem_types(self):
        # The mixin tests the three losses only of classes in the tables of text and image classifiers.
        table = modeling_common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        with mock.patch.dict(table, videomamba=self.all_model_classes[-1].__name__):
            super().test_problem_types()

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        # The mixin looks for the weight of the input embeddings, which for tubelets is a convolution's.
        weight = property(lambda self: self.projection.weight)
        with mock.patch.object(VideoMambaPatchEmbeddings, "weight", weight, create=True):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), VideoMambaPatchEmbeddings)
            others = VideoMambaPatchEmbeddings(model.config)
            model.set_input_embeddings(others)
            self.assertIs(model.get_input_embeddings(), others)
            self.assertIs(model.base_model.embeddings.patch_embeddings, others)
            self.assertIsNone(model.get_output_embeddings())

    def run_task_tests(self, task, **kwargs):
        # Of the models on the Hub the mixin would take a tiny one; ours is made here.
        model_class = self.all_model_classes[-1]
        with tempfile.TemporaryDirectory() as folder:
            repository = f"{folder}/videomamba/{model_class.__name__}"
            model_class(self.model_tester.get_config()).save_pretrained(repository)
            of_images = model_class is VideoMambaForImageClassification
            VideoMambaImageProcessor(size=18, crop_size=16, single_images=of_images).save_pretrained(repository)
            VideoMambaVideoProcessor(size=18, crop_size=16, num_frames=4).save_pretrained(repository)
            summary = {"tokenizer_classes": [], "processor_classes": [VideoMambaImageProcessor.__name__]}
            with mock.patch.multiple(
                pipeline_common,
                TRANSFORMERS_TINY_MODEL_PATH=folder,
                tiny_model_summary={model_class.__name__: summary},
                transformers_module=modeling_videomamba,
            ):
                super().run_task_tests(task, **kwargs)


class VideoMambaImageModelTester(VideoMambaModelTester):
    num_frames = 1
    tubelet_size = 1
    merge_layers = None
    seq_length = 1 + 2 * 2  # the class token, and the patches

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling_common.floats_tensor(shape)}


class VideoMambaImageModelTest(VideoMambaModelTest):
    all_model_classes = (VideoMambaForImageClassification,)
    pipeline_model_mapping = {"image-classification": VideoMambaForImageClassification}
    model_tester_class = VideoMambaImageModelTester


class VideoMambaTextlessTester(VideoMambaModelTester):
    def get_config(self):
        config = super().get_config()
        config.vocab_size = None  # the training mixin reads it
        return config


class VideoMambaTrainingTest(training_common.TrainingTesterMixin, unittest.TestCase):
    """A tiny model learns one batch by heart."""

    model_tester = VideoMambaTextlessTester()
    all_model_classes = (VideoMambaForVideoClassification,)
    training_overfit_steps = 60
    training_overfit_learning_rate = 3e-3

    # The mixin makes batches of text alone, and lets no other modality pass.
    def _get_model_modality(self):
        return "text"

    def _create_text_training_batch(self, batch_size, **kwargs):
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return {"pixel_values": inputs["pixel_values"][:batch_size], "labels": torch.arange(batch_size)}


class ProcessorTester:
    """Small settings and random clips, by the names the mixins read."""

    batch_size = 3
    num_frames = 4
    num_channels = 3
    settings = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 18, "width": 18},
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": IMAGENET_STANDARD_MEAN,
        "image_std": IMAGENET_STANDARD_STD,
    }

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return video_common.prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        return self.prepare_video_inputs(equal_resolution, "np" if numpify else "torch" if torchify else "pil")

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 18, 18


@skip_not_applicable
class VideoMambaImageProcessingTest(image_common.ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = IMAGE_PROCESSOR_MAPPING[VideoMambaConfig]
    image_processor_dict = ProcessorTester.settings
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = ProcessorTester()

    # The mixin's inputs are images; ours are clips, lists of frames.
    def check_call(self, return_tensors, num_channels=3, **kwargs):
        self.image_processor_tester.num_channels = num_channels
        clips = self.image_processor_tester.prepare_video_inputs(return_tensors=return_tensors)
        processor = VideoMambaImageProcessor(**self.image_processor_dict)
        shape = self.image_processor_tester.expected_output_video_shape(clips)
        one = processor(list(clips[0]), return_tensors="pt", **kwargs).pixel_values
        self.assertEqual(one.shape, (1, *shape))
        batch = processor([list(clip) for clip in clips], return_tensors="pt", **kwargs).pixel_values
        self.assertEqual(batch.shape, (len(clips), *shape))
        torch.testing.assert_close(batch[:1], one)

    def test_call_pil(self):
        self.check_call("pil")

    def test_call_numpy(self):
        self.check_call("np")

    def test_call_pytorch(self):
        self.check_call("torch")

    def test_call_numpy_4_channels(self):
        self.check_call("np", 4, do_convert_rgb=False, image_mean=[0.0] * 4, image_std=[1.0] * 4)


@skip_not_applicable
class VideoMambaVideoProcessingTest(video_common.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VideoMambaVideoProcessor
    video_processor_dict = ProcessorTester.settings
    input_name = "pixel_values"
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = ProcessorTester()
