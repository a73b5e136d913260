"""A small Llama with random weights and a tokenizer trained on the spot, for tests of export and llama.cpp."""

import pydoc_data.topics

TEXTS = [
    "The for statement is used to iterate over the elements of a sequence.",
    "  two leading spaces, and trailing  ",
    "CRLF\r\nand\r\n\r\nlone \r and \n\n\ntabs\t\tmixed \t \n x",
    "emoji 😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 and é vs e\u0301",
    "<|endoftext|>begins, holds <|endoftext|> and ends<|endoftext|>",
    "almost <|endoftext| > special < |endoftext|>",
    "I'll we've DON'T it's 'tis can't've",
    "1234567 3.14159 0x1F ١٢٣ Ⅷ ½ ² ₂",
    "日本語のテキスト 한국어 עברית العربية हिन्दी ไทย",
    "no-break\u00a0space em\u2003quad zero\u200bwidth bom\ufeff line\u2028sep next\u0085line",
    "control \x00 \x01 \x1f \x7f and private \ue000 astral \U0001f9ff \U000e0061",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    " ",
    "\n",
    "a",
    "",
]


def tokenizer(vocab_size=512):
    """A byte-level BPE of GPT-2's kind; ``<|endoftext|>`` is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    return tok


def model(layers=2, vocab=512, **changes):
    """The course's Llama with fewer layers; weights large enough that an error in any of them shows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=vocab, hidden_size=256, intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.05, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return llama


def save(folder, llama=None):
    """Write a complete Hugging Face model folder and return it."""
    from transformers import PreTrainedTokenizerFast

    (llama or model()).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder
