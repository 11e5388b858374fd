"""
What the original model computes, from its own weights by their own names: a converted model is compared with it.

Models of Transformers are opened by Transformers. The code of the other origins is no dependency, so their formulas
stand here once more, in the way of their reference implementations and without any part of a CBSA model.
"""

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig

from ..configuration_cbsa import CBSAConfig


class Weights(dict):
    """
    Weights by name, and the layers that they belong to.

    Args:
        weights: name -> tensor.
        eps: epsilon of the LayerNorms.
        num_heads: heads of the attention.
    """

    def __init__(self, weights: dict[str, torch.Tensor], eps: float, num_heads: int):
        super().__init__(weights)
        self.eps = eps
        self.num_heads = num_heads

    def below(self, prefix: str) -> "Weights":
        """The weights whose names begin with `prefix`, without it."""
        found = {name.removeprefix(prefix): tensor for name, tensor in self.items() if name.startswith(prefix)}
        return Weights(found, self.eps, self.num_heads)

    def layers(self, prefix: str) -> list["Weights"]:
        """Those of the layers 0, 1, 2, ... below `prefix`."""
        count = len({name.removeprefix(prefix).split(".")[0] for name in self if name.startswith(prefix)})
        return [self.below(f"{prefix}{i}.") for i in range(count)]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The linear layer of that name, with a bias if there is one."""
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str, eps: float | None = None) -> torch.Tensor:
        """The LayerNorm of that name."""
        weight, bias = self[f"{name}.weight"], self[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.eps if eps is None else eps)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, N, h * p) -> (batch, h, N, p)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def add_tokens(w: Weights, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Patches (batch, d, height, width) -> tokens (batch, 1 + patches, d) with CLS and positions."""
    patches = patches.flatten(2).transpose(1, 2)
    return torch.cat([w["cls_token"].expand(len(patches), -1, -1), patches], dim=1) + positions


def vit_layer(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """A layer of timm's ViT; DINOv2's has `ls1` and `ls2` too."""
    q, k, v = (w.split_heads(part) for part in w.linear(w.norm(x, "norm1"), "attn.qkv").chunk(3, dim=2))
    attention = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
    update = w.linear((attention @ v).transpose(1, 2).flatten(2), "attn.proj")
    x = x + update * w.get("ls1.gamma", 1)
    update = w.linear(F.gelu(w.linear(w.norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
    return x + update * w.get("ls2.gamma", 1)


def vit(w: Weights, pixel_values: torch.Tensor) -> torch.Tensor:
    """timm's ViT and the original DINOv2, up to the last norm: tokens (batch, N, d)."""
    kernel = w["patch_embed.proj.weight"]
    patches = F.conv2d(pixel_values, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[2:])
    positions = w["pos_embed"]
    if positions.shape[1] == patches.shape[2] * patches.shape[3]:  # timm's models with registers: none for CLS
        positions = F.pad(positions, (0, 0, 1, 0))
    x = add_tokens(w, patches, positions)
    registers = w.get("register_tokens", w.get("reg_token"))
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for layer in w.layers("blocks."):
        x = vit_layer(layer, x)
    return w.norm(x, "norm")


def embed_patches(w: Weights, pixel_values: torch.Tensor) -> torch.Tensor:
    """The three patch embeddings of the white-box models -> (batch, d, height, width)."""
    if "conv1.weight" in w:
        return F.conv2d(pixel_values, w["conv1.weight"], w["conv1.bias"], stride=w["conv1.weight"].shape[2:])
    if "to_patch_embedding.2.weight" in w:
        side = round((w["to_patch_embedding.2.weight"].shape[1] / 3) ** 0.5)
        patches = F.unfold(pixel_values, side, stride=side).unflatten(1, (3, side**2))
        patches = patches.transpose(1, 2).flatten(1, 2).transpose(1, 2)  # row, column, channel
        patches = w.norm(
            w.linear(w.norm(patches, "to_patch_embedding.1"), "to_patch_embedding.2"), "to_patch_embedding.3"
        )
        return patches.transpose(1, 2).unflatten(2, (pixel_values.shape[2] // side, -1))
    x = pixel_values
    for i in range(0, 2 * len({name for name in w if name.endswith("running_mean")}), 2):
        norm = w.below(f"to_patch_embedding.proj.{i}.1.")
        x = F.conv2d(F.gelu(x) if i else x, w[f"to_patch_embedding.proj.{i}.0.weight"], stride=2, padding=1)
        x = F.batch_norm(x, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"])
    return x


def contract_and_broadcast(w: Weights, x: torch.Tensor, num_pooled: int, side: int) -> torch.Tensor:
    """CBSA as its reference implementation writes it; the first `num_pooled` tokens make a square that is pooled."""
    p = x.shape[3]
    grid = x[:, :, :num_pooled].transpose(2, 3).unflatten(3, (round(num_pooled**0.5), -1))
    rep = F.adaptive_avg_pool2d(grid.flatten(1, 2), side).flatten(2).unflatten(1, (-1, p)).transpose(2, 3)
    attention = (rep @ x.transpose(2, 3) / p**0.5).softmax(-1)
    rep = rep + w["step_rep"] * (attention @ x)
    contracted = (rep @ rep.transpose(2, 3) / p**0.5).softmax(-1) @ rep
    return w["step_x"] * (attention.transpose(2, 3) @ contracted)


def white_box_attention(w: Weights, x: torch.Tensor, num_pooled: int, side: int) -> torch.Tensor:
    """The update of CBT, ToST or CRATE, by what weights there are: (batch, N, d) -> (batch, N, d)."""
    x = w.split_heads(w.linear(x, "proj" if "proj.weight" in w else "qkv"))
    if "step_rep" in w:
        update = contract_and_broadcast(w, x, num_pooled, side)
    elif "temp" in w:
        squares = F.normalize(x, dim=2).square().sum(-1)
        membership = (squares * w["temp"]).softmax(1).unsqueeze(3)
        moments = (membership / membership.sum(2, keepdim=True) * x.square()).sum(2, keepdim=True)
        update = -membership * x / (1 + moments)
    else:
        update = (x @ x.transpose(2, 3) / x.shape[3] ** 0.5).softmax(-1) @ x
    return w.linear(update.transpose(1, 2).flatten(2), "to_out.0" if "to_out.0.weight" in w else "to_out")


def sparse_code(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """ISTA of CRATE, or the overcomplete dictionaries of CRATE-alpha; both have step and threshold 0.1."""
    if "D" not in w:
        D = w["weight"]
        return F.relu(x + 0.1 * ((x - x @ D.T) @ D) - 0.1 * 0.1)
    D, D1 = w["D"], w["D1"]
    code = F.relu(0.1 * x @ D - 0.1 * 0.1)
    return F.relu(code - 0.1 * (code @ D.T - x) @ D - 0.1 * 0.1) @ D1.T


def white_box(w: Weights, pixel_values: torch.Tensor) -> torch.Tensor:
    """CBT, ToST, CRATE and CRATE-alpha: logits (batch, classes)."""
    x = add_tokens(w, embed_patches(w, pixel_values), w["pos_embedding"])
    for layer in w.layers("transformer.layers."):
        # The reference implementation pools all tokens but the last one, CLS among them.
        x = x + white_box_attention(layer.below("0.fn."), layer.norm(x, "0.norm"), x.shape[1] - 1, side=8)
        code = sparse_code(layer.below("1.fn."), layer.norm(x, "1.norm"))
        x = x + code if "1.fn.D" in layer else code
    return w.linear(w.norm(x[:, 0], "mlp_head.0", eps=1e-5), "mlp_head.1")


def mask_decoder(w: Weights, patches: torch.Tensor) -> torch.Tensor:
    """The decoders of CBT's segmenter and of Segmenter: patches (batch, N, d) -> masks (batch, N, classes)."""
    num_patches = patches.shape[1]
    is_segmenter = "proj_patch" in w
    x = w.linear(patches, "proj_dec") if is_segmenter else patches
    x = torch.cat([x, w["cls_emb"].expand(len(x), -1, -1)], dim=1)
    for layer in w.layers("blocks." if is_segmenter else "net.layers."):
        if is_segmenter:
            x = vit_layer(layer, x)
        else:
            attention = layer.below("fn.")
            attention.num_heads = len(attention["step_rep"])
            x = x + white_box_attention(attention, layer.norm(x, "norm"), num_patches, side=10)
    x = w.norm(x, "decoder_norm")
    patches, classes = x[:, :num_patches], x[:, num_patches:]
    if is_segmenter:
        patches, classes = patches @ w["proj_patch"], classes @ w["proj_classes"]
    return w.norm(F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2), "mask_norm")


def original_outputs(
    weights: dict[str, torch.Tensor],
    origin: str,
    config: CBSAConfig,
    pixel_values: torch.Tensor,
    source_config: PreTrainedConfig | None = None,
) -> torch.Tensor:
    """
    What the original computes for one input.

    Args:
        weights: by the names of the origin.
        origin: a name in `ORIGINS`.
        config: of the converted model; only the number of heads and the epsilon are taken from it.
        pixel_values: (batch, channels, height, width), of the size that the model was trained for.
        source_config: of a model of Transformers.

    Returns:
        Logits (batch, classes); of a segmenter the masks (batch, classes, patches); of an encoder without a head the
        tokens after the last norm (batch, N, d).
    """
    if source_config is not None:
        auto_class = AutoModelForImageClassification if "classifier.weight" in weights else AutoModel
        with torch.device("meta"):
            model_class = type(auto_class.from_config(source_config))
        model = model_class.from_pretrained(None, config=source_config, state_dict=weights, dtype=torch.float32)
        outputs = model.eval()(pixel_values)
        return outputs.logits if "classifier.weight" in weights else outputs.last_hidden_state
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    w = Weights(floats, config.layer_norm_eps, config.num_attention_heads)
    if origin in ("cbt-segmenter", "segmenter"):
        tokens = vit(w.below("encoder."), pixel_values)
        return mask_decoder(w.below("decoder."), tokens[:, 1:]).transpose(1, 2)
    if origin != "timm":
        return white_box(w, pixel_values)
    tokens = vit(w, pixel_values)
    return w.linear(tokens[:, 0], "head") if "head.weight" in w else tokens
