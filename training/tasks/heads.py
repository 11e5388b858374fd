"""Loading a pretrained model for the classes of a data set."""

from copy import deepcopy

import torch
from transformers import PreTrainedModel

from cbsa_hf.checkpoints import check_weights, load_config, saved_as
from cbsa_hf.checkpoints.weight_files import check_finite, find_folder


def class_tensors(model: PreTrainedModel) -> set[str]:
    """Names of the parameters and buffers whose shape depends on the number of classes."""
    config = deepcopy(model.config)
    config.num_labels += 1
    with torch.device("meta"):
        other = type(model)(config).state_dict()
    return {name for name, tensor in model.state_dict().items() if tensor.shape != other[name].shape}


def load_for_classes(auto_class: type, source: str, names: dict[int, str], **changes) -> PreTrainedModel:
    """
    Load a pretrained model for the classes of a data set.

    If its own classes have the same names in the same order, all weights are kept. Otherwise the weights whose shape
    depends on the number of classes are initialised anew, and all others are kept.

    Args:
        auto_class: the class of Transformers to load it with.
        source: folder or hub id.
        names: the classes by number.
        **changes: to its configuration.

    Raises:
        ValueError: if there is no such model, it is damaged, or it is not a model of this library.
    """
    source = str(find_folder(source))
    config = load_config(source)
    check_weights(source, config, saved_as(config)[0])
    own = config.id2label
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    model = auto_class.from_pretrained(
        source, ignore_mismatched_sizes=True, use_safetensors=True, trust_remote_code=False, **labels, **changes
    )
    check_finite(model, source)
    if own != names:
        fresh = type(model)(model.config).state_dict()
        model.load_state_dict({name: fresh[name] for name in class_tensors(model)}, strict=False)
    return model
