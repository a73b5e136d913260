"""Hugging Face tokenizers rebuilt from the vocabulary files in llama.cpp's source, and llama.cpp's own answers."""

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from qtutor import gguf_export
from qtutor.checkpoints import convert

CONTROL, USER, BYTE, UNUSED = 3, 4, 6, 5


def _file(name, suffix=""):
    return convert.folder() / "models" / f"ggml-vocab-{name}.gguf{suffix}"


def available(name="llama-spm"):
    return _file(name).is_file()


def read(name):
    """Metadata below tokenizer.ggml of a vocabulary file."""
    fields = gguf.GGUFReader(_file(name)).fields
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in fields.items()}


def answers(name):
    """(text, ids) of llama.cpp's own test of a vocabulary, without bos."""
    texts = _file(name, ".inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = _file(name, ".out").read_text("utf-8").split("\n")
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=False)]


def merges_of(vocabulary):
    """SentencePiece's scores as a list of merges: those that make the best piece come first."""
    rank = dict(zip(vocabulary["tokens"], vocabulary["scores"], strict=True))
    kinds = dict(zip(vocabulary["tokens"], vocabulary["token_type"], strict=True))
    pieces = {text for text, kind in kinds.items() if kind == 1}
    pairs = [(-rank[text], len(text[:at]), text[:at], text[at:]) for text in pieces for at in range(1, len(text))
             if text[:at] in pieces and text[at:] in pieces]  # fmt: skip
    return [(left, right) for _, _, left, right in sorted(pairs)]


def sentencepiece(name, prefix=True):
    """A tokenizer of Llama 2's kind (``prefix``) or Gemma's from a vocabulary with scores, or with merges."""
    found = read(name)
    tokens, kinds = found["tokens"], found["token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in found["merges"]] if "merges" in found else merges_of(found)
    vocab = {text: at for at, text in enumerate(tokens)}
    merges = [pair for pair in merges if "".join(pair) in vocab and pair[0] in vocab and pair[1] in vocab]
    unknown = tokens[found["unknown_token_id"]]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
    return _special(tok, found, {CONTROL, 2}, tokens, kinds)


def byte_level(name):
    found = read(name)
    tokens, kinds = found["tokens"], found["token_type"]
    vocab = {text: at for at, text in enumerate(tokens) if kinds[at] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in found["merges"]]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"))
    regex = {pre: regex for regex, pre in gguf_export._SPLIT_REGEX.items()}.get(name)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = [pre_tokenizers.Split(Regex(regex), behavior="isolated")] if regex else []
    tok.pre_tokenizer = pre_tokenizers.Sequence([*split, plain]) if split else plain
    tok.decoder = decoders.ByteLevel()
    return _special(tok, found, {CONTROL}, tokens, kinds)


def _special(tok, found, control, tokens, kinds):
    for at, kind in enumerate(kinds):
        if kind in control or kind == USER:
            tok.add_tokens([AddedToken(tokens[at], special=kind in control, normalized=False)])
    if found.get("add_bos_token") or "llama-bpe" == found.get("pre"):
        text, number = tokens[found["bos_token_id"]], found["bos_token_id"]
        tok.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, number)]
        )
    return tok, {f"{key}_token_id": found.get(f"{key}_token_id") for key in ("bos", "eos")}, tokens
