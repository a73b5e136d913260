"""Records of training whole models on one GPU: embedding, decoder layers, head, loss, optimizer.

``fp8_model`` times the same step in each way that people run it, BF16 and FP8, at the shapes of Llama-2-7B and
Llama-3-8B with half of their layers, which fit 80 GB in every arm but one; ``fp8_finetune`` is Llama-3-8B with all its
layers, full fine-tuning against LoRA and QLoRA.  Weights are random and tokens too: neither changes what a step
computes.

One optimizer for all: AdamW on BF16 parameters, moments in BF16.  FP8 weights cannot take small updates, so there
Transformer Engine's FusedAdam keeps master weights and moments in FP32, as its kernel for FP8 parameters asks for.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import nn
from torch.nn import functional as F

from qtutor import measure, results
from qtutor.decide import capacity
from qtutor.rigs import fp8_layers as rig
from qtutor.rigs import techniques

from .steps import timed

RATE = 1e-5
MODELS = {"Llama-2-7B": (4, 2048), "Llama-3-8B": (4, 2048)}  # batch and sequence
LAYERS = 16
SKIPPED = "TE FP8 block", "TE FP8 delayed + FP8 weights"  # of the second model: its FP32 optimizer takes 73 GB
SLOPE = "TE BF16", "TE FP8 current", "TE FP8 delayed", "TE FP8 delayed + FP8 weights"  # also with fewer layers
ARMS = {  # the arguments of huggingface() or, with "te", of te_llama()
    "Hugging Face BF16": {},
    "Hugging Face BF16, compiled": {"compiled": True},
    "torchao FP8 tensorwise, compiled": {"compiled": True, "float8": "tensorwise"},
    "torchao FP8 rowwise, compiled": {"compiled": True, "float8": "rowwise"},
    "TE BF16": {"te": {}},
    "TE FP8 block": {"te": {"recipe": "block"}},
    "TE FP8 current": {"te": {"recipe": "current"}},
    "TE FP8 delayed": {"te": {"recipe": "delayed"}},
    "TE FP8 delayed + FP8 weights": {"te": {"recipe": "delayed", "fp8_weights": True}},
    "TE FP8 delayed + fast accumulation": {"te": {"recipe": "delayed", "fast_accumulation": True}},
}
TUNED = {"full BF16, Hugging Face": {"checkpointing": True},
         "full BF16, TE": {"te": {"checkpointing": True}},
         "full FP8 current, TE": {"te": {"recipe": "current", "checkpointing": True}},
         "full FP8 delayed, TE": {"te": {"recipe": "delayed", "checkpointing": True}},
         "LoRA BF16": {"checkpointing": True, "adapter": "LoRA"},
         "QLoRA NF4": {"checkpointing": True, "adapter": "QLoRA"}}  # fmt: skip


def loss_of(logits, targets):
    """Cross entropy in FP32 of logits (batch, tokens, vocabulary)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def te_llama(config: dict, shape: rig.Shape, layers: int, **options):
    """A Llama out of te.TransformerLayer: (module, ``loss(ids, targets)``); options are those of rig.te_layers."""
    te = rig.require_fp8()
    stack, forward = rig.te_layers(shape, layers, **options)
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    ends = nn.ModuleDict({"embed": nn.Embedding(config["vocab_size"], shape.hidden, **bf16),
                          "norm": te.RMSNorm(shape.hidden, device="cuda", dtype=torch.bfloat16),
                          "head": nn.Linear(shape.hidden, config["vocab_size"], bias=False, **bf16),
                          "layers": stack})  # fmt: skip
    nn.init.normal_(ends["embed"].weight, std=0.02)

    def loss(ids, targets):
        return loss_of(ends["head"](ends["norm"](forward(ends["embed"](ids)))), targets)

    return ends, loss


def huggingface(config: dict, layers: int, compiled=False, float8=None, checkpointing=False, adapter=None):
    """transformers' Llama: (module, ``loss(ids, targets)``).

    ``compiled``: torch.compile, decoder layer by decoder layer, and of head and loss; ``float8``: torchao's recipe for
    training; ``adapter``: "LoRA" (rank 16 on all matrices), or "QLoRA" with the frozen weights in NF4 (bitsandbytes).
    """
    model = techniques.float_model(config | {"num_hidden_layers": layers, "attn_implementation": "sdpa"}, "cuda")
    model.train().requires_grad_(True)
    if adapter:
        model = with_adapter(model, adapter == "QLoRA")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llama = model.get_base_model() if adapter else model
    if float8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(llama.model, config=Float8LinearConfig.from_recipe_name(float8))

    def ending(hidden, targets):
        return loss_of(llama.lm_head(hidden), targets)

    if compiled:
        for layer in llama.model.layers:
            layer.compile()
        ending = torch.compile(ending)
    return model, lambda ids, targets: ending(llama.model(input_ids=ids, use_cache=False).last_hidden_state, targets)


def with_adapter(llama, nf4: bool):
    """PEFT's LoRA on all matrices of the layers, the rest frozen and (``nf4``) quantized as QLoRA does."""
    import peft

    if nf4:
        import bitsandbytes as bnb

        for parent, name, child in list(techniques.body_linears(llama)):
            new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type="nf4",
                                    compute_dtype=torch.bfloat16, device="meta")  # fmt: skip
            new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4",
                                           compress_statistics=True, module=new).to(child.weight.device)  # fmt: skip
            setattr(parent, name, new)
        llama.is_loaded_in_4bit = True
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")
    return peft.get_peft_model(llama, config, autocast_adapter_dtype=False)  # BF16: FP32 products would be slow


def training_step(module, loss, optimizer, vocabulary: int, batch: int, sequence: int):
    """Return ``step()``: forward, backward and the optimizer's update on one of eight random batches."""
    ids = torch.randint(0, vocabulary, (8, batch, sequence + 1), device="cuda")
    turn = itertools.cycle(ids.unbind(0))

    def step():
        rows = next(turn)
        loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build(model: str, layers: int, arm: dict, batch: int, sequence: int):
    """Build an arm; return (trained parameters, name of the optimizer, ``step()``)."""
    torch.manual_seed(0)
    config = capacity.config_of(model)
    shape = rig.Shape(model, *(config[size] for size in rig.SIZES), batch, sequence)
    made = te_llama(config, shape, layers, **arm["te"]) if "te" in arm else huggingface(config, layers, **arm)
    parameters = [p for p in made[0].parameters() if p.requires_grad]
    if arm.get("te", {}).get("fp8_weights"):
        te = rig.require_fp8()
        optimizer = te.optimizers.FusedAdam(parameters, lr=RATE, weight_decay=0.1, master_weights=True)
        name = "te FusedAdam, FP32 master weights and moments"
    else:
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.1, fused=True)
        name = f"torch AdamW, {str(parameters[0].dtype).removeprefix('torch.')}"
    return parameters, name, training_step(*made, optimizer, config["vocab_size"], batch, sequence)


def measured(model: str, layers: int, name: str, arm: dict, batch: int, sequence: int, seconds: float) -> dict:
    """The row of one arm: throughput, energy, peak memory of a training step; ``not_run`` where it does not fit."""
    rig.require_fp8()
    rig.free()
    row = {"shape": model, "layers": layers, "rung": name, "batch": batch, "sequence": sequence,
           "tokens": batch * sequence}  # fmt: skip
    before = torch.cuda.memory_allocated() / measure.GIB
    try:
        with measure.track_memory("cuda") as memory:
            parameters, row["optimizer"], step = build(model, layers, arm, batch, sequence)
            row["trained_weights"] = sum(p.numel() for p in parameters)
            for _ in range(4):  # the first step makes the optimizer's state, compiled code and scales
                step()
        row |= timed(step, seconds) | {"peak_gib": round(memory.peak - before, 3)}
        row["train_tokens_per_s"] = round(row["tokens"] / row["ms_per_step"] * 1000, 1)
    except Exception as error:  # noqa: BLE001 - an arm that does not fit must not cost the rest
        row["not_run"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    step = parameters = None
    torch._dynamo.reset()
    rig.free()
    return row


def record_model(full: bool):
    """``fp8_model``: every arm at LAYERS layers, and those of SLOPE at 4 and 8, for the memory of one layer more."""
    save, rows = functools.partial(results.save, "fp8_model", profile="full" if full else "quick"), []
    for model, (batch, sequence) in MODELS.items() if full else [("Llama-2-7B", (1, 512))]:
        for name, arm in ARMS.items():
            if model == "Llama-3-8B" and name in SKIPPED:
                continue
            slope = (4, 8) if full and name in SLOPE and model == "Llama-2-7B" else ()
            for layers in (*slope, LAYERS if full else 2):
                rows.append(measured(model, layers, name, arm, batch, sequence, 10 if layers == LAYERS else 1))
                path = save(rows)
    for name in ("TE BF16", "TE FP8 delayed", "TE FP8 delayed + fast accumulation") if full else ():  # more tokens
        rows.append(measured("Llama-2-7B", LAYERS, name, ARMS[name], 8, 2048, 10))
        path = save(rows)
    return path


def record_finetune(full: bool):
    """``fp8_finetune``: Llama-3-8B's shape on one card: full fine-tuning in BF16 and FP8, LoRA and QLoRA."""
    rows, (batch, sequence) = [], (2, 2048) if full else (1, 256)
    for name, arm in TUNED.items():
        rows.append(measured("Llama-3-8B", 32 if full else 1, name, arm, batch, sequence, 10 if full else 1))
        path = results.save("fp8_finetune", rows, profile="full" if full else "quick")
    return path


RECORDS = {"fp8_model": record_model, "fp8_finetune": record_finetune}
