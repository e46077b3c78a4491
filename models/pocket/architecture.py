"""The model before training: its sizes, its tokenizer and its processor, in llava-hf's format."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from models.pocket import talk
from models.pocket.questions import KINDS, any_question
from models.pocket.scenes import random_scene

SIDE = 112  # pixels; a picture of any other size or shape is squeezed to this square
PATCH = 16  # pixels
GRID = SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
CONTEXT = 4096  # tokens
VOCABULARY = 2048

UNK, BOS, EOS, IMAGE, PAD, SYSTEM, USER, ASSISTANT = range(8)
_SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]

# Images of a turn come before its text. Any turn's text is trimmed, so that a stray blank does not
# change the tokens.
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over what the model talks about.

    The alphabet holds all 256 bytes, so that every text round-trips; numbers up to 120 are one
    token each, with and without a space before them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _corpus(Random(7)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def _corpus(random: Random) -> list[str]:
    numbers = [text for number in range(121) for text in (str(number), f" {number}")]
    texts = numbers * 40
    for fact in talk.facts():
        # Not the answers in other scripts: their letters stay single bytes, several to a
        # character, so that a stream of them shows whether a server cuts characters in half.
        if fact.answer.isascii():
            texts += [*fact.seen, *([fact.answer] * 4)]
    texts += [*talk.elsewhere("train"), *talk.SYSTEM_PROMPTS * 10]
    for _ in range(4000):
        scene = random_scene(random)
        for question in (any_question(random, scene, dict.fromkeys(KINDS, 1.0)) for _ in range(3)):
            texts += [question.text, question.answer]
        for turn in talk.conversation(random):
            if turn.answer.isascii() and turn.kind != "fact":
                texts += [turn.text, turn.answer]
    return texts


def processor(words: PreTrainedTokenizerFast) -> LlavaProcessor:
    square = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(
        size=square,
        crop_size=square,
        do_center_crop=False,  # nothing of a picture is cut off
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # CLIP's class token, which LLaVA leaves out
        chat_template=CHAT_TEMPLATE,
    )


def empty_model(seed: int) -> LlavaForConditionalGeneration:
    """The model with random weights, in float32."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        # Eager: on a CPU the backward of torch's fused attention is slower than the plain formula.
        attn_implementation="eager",
    )
    return LlavaForConditionalGeneration(config)


def whiten(patches: nn.Conv2d, positions: nn.Embedding, pictures: torch.Tensor) -> None:
    """Start the patch embedding from the whitened principal components of real patches.

    In a first try (one run each) the tower told .40 of the shapes after 9,800 pictures with this,
    and .27 after 11,900 without.

    Args:
        pictures: normalized, of shape (pictures, 3, SIDE, SIDE).
    """
    width = patches.out_channels
    rows = pictures.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    rows = rows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * PATCH * PATCH).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    whitening = (vectors / (values + values[0] * 3e-4).sqrt()).T * 0.6
    mixed = (torch.linalg.qr(torch.randn(width, width).double())[0] @ whitening).float()
    with torch.no_grad():
        patches.weight.copy_(mixed.reshape(width, 3, PATCH, PATCH))
        positions.weight.normal_(0, 0.3).sub_((mixed @ mean.float()).to(positions.weight.device))


def save(model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, to: Path) -> None:
    """Write ``model`` in bfloat16, with tokenizer and processor, as llava-hf checkpoints are."""
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD
    )
    model.save_pretrained(to)
    words.save_pretrained(to)
    processor(words).save_pretrained(to)
