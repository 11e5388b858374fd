"""
The common model tests of Transformers, for CBSA and, for comparison, for ViT. `run_transformers_tests.py` copies this
file to `tests/models/cbsa/test_modeling_cbsa.py` in Transformers' source, where its relative imports work.
"""

import unittest

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.auto import modeling_auto

from cbsa_hf import CBSABackbone, CBSAConfig, CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel

from ...test_backbone_common import BackboneTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor


# The common tests recognise a class by these names.
modeling_auto.MODEL_MAPPING_NAMES["cbsa"] = "CBSAModel"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["cbsa"] = "CBSAForImageClassification"
modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["cbsa"] = "CBSAForSemanticSegmentation"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["cbsa"] = "CBSABackbone"


class ModelTester:
    batch_size = 2
    image_size = 32
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_labels = 10
    mask_length = (32 // 8) ** 2
    num_masks = mask_length // 2
    seq_length = 1 + mask_length
    is_training = True

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(
            image_size=self.image_size,
            patch_size=8,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            num_labels=self.num_labels,
            **({"representatives_size": 2} if self.config_class is CBSAConfig else {}),
        )

    def prepare_config_and_inputs(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class VisionModelTest(ModelTesterMixin):
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = ModelTester(self.config_class)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, hidden_size=48
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("Image models take no token embeddings")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())


class ViTModelTest(VisionModelTest, unittest.TestCase):
    config_class = ViTConfig
    all_model_classes = (ViTForImageClassification, ViTModel)


class CBSAModelTest(VisionModelTest, unittest.TestCase):
    config_class = CBSAConfig
    all_model_classes = (CBSAForImageClassification, CBSAForSemanticSegmentation, CBSAModel)

    @unittest.skip("The output is not computed from the map A^T A, so the map has no gradient")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class CBSABackboneTest(BackboneTesterMixin, unittest.TestCase):
    config_class = CBSAConfig
    all_model_classes = (CBSABackbone,)

    def setUp(self):
        self.model_tester = ModelTester(CBSAConfig)
