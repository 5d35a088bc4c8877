"""Write a Llama with 260,000 random weights, its tokenizer and its chat template: enough for a real engine to serve.

Run with a Python that has torch, transformers and tokenizers: ``.cache/vllm/bin/python scripts/tiny_model.py FOLDER``.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 512
HEAD_SIZE = 32
"""The least that vLLM's attention on a CPU takes."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, trained on this file."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet)
    inner.train_from_iterator([Path(__file__).read_text()], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    made.chat_template = TEMPLATE
    return made


def main(folder: str) -> int:
    """Write the model into a folder."""
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
