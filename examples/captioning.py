"""
Captions: a CBSA encoder with a small GPT-2 as decoder learns to describe 16 scenes.

    python examples/captioning.py
    python examples/captioning.py --encoder vit
    python examples/captioning.py --cost
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, VisionEncoderDecoderModel

from examples.encoders import ENCODERS, compare_cost, encoder_config, parse_options, train
from examples.scenes import NAMES, Scene, draw_scenes, to_pixel_values


NUM_STEPS = 150
MAX_WORDS = 8


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word."""
    words = ["<pad>", "<s>", "</s>", "a", "left", "of", "above", *NAMES]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def build_captioner(encoder: str, tokenizer: PreTrainedTokenizerFast) -> VisionEncoderDecoderModel:
    """An encoder and a GPT-2 that attends to its tokens, both with random weights."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_WORDS + 2,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        add_cross_attention=True,
        **special,
    )
    model = VisionEncoderDecoderModel(
        encoder=AutoModel.from_config(encoder_config(encoder)), decoder=GPT2LMHeadModel(decoder)
    )
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = tokenizer.bos_token_id
    for name, value in special.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model


def to_labels(scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """
    `labels`: captions as tokens, each closed by the end token, (batch, words); the loss ignores -100. And the mask of
    what the decoder reads: the start token and the words, without the last.
    """
    texts = [scene.caption + tokenizer.eos_token for scene in scenes]
    tokens = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    return {"labels": labels, "decoder_attention_mask": F.pad(tokens.attention_mask[:, :-1], (1, 0), value=1)}


def describe(model: VisionEncoderDecoderModel, scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The most likely caption of each scene, word after word."""
    pixel_values = to_pixel_values([scene.image for scene in scenes])
    tokens = model.eval().generate(pixel_values, max_new_tokens=MAX_WORDS, do_sample=False, num_beams=1)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and score, or compare costs; returns the numbers."""
    args = parse_options(__doc__, NUM_STEPS, argv)
    scenes, tokenizer = draw_scenes(args.num_images, args.seed), build_tokenizer()
    inputs = {"pixel_values": to_pixel_values([scene.image for scene in scenes]), **to_labels(scenes, tokenizer)}
    torch.manual_seed(args.seed)
    if args.cost:
        models = {name: build_captioner(name, tokenizer).train() for name in ENCODERS}
        steps = {n: lambda m=m: m(**inputs).loss.backward() for n, m in models.items()}
        result = {"training step, CBSA / ViT": compare_cost(steps)}
        steps = {n: lambda m=m: describe(m, scenes, tokenizer) for n, m in models.items()}
        result["captions, CBSA / ViT"] = compare_cost(steps)
    else:
        model = build_captioner(args.encoder, tokenizer)
        train(model, lambda: model(**inputs).loss, args.num_steps, learning_rate=1e-3)
        captions = describe(model, scenes, tokenizer)
        for scene, caption in zip(scenes, captions, strict=True):
            print(f"{scene.caption!r} -> {caption!r}")
        pairs = zip(scenes, captions, strict=True)
        result = {"exact captions": sum(s.caption == c for s, c in pairs) / len(scenes)}
    for name, value in result.items():
        print(f"{name}: {value:.3f}")
    return result


if __name__ == "__main__":
    main()
