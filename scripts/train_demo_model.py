"""Train the bundled demo model: a small Cohere2 language model on public-domain books.

    python scripts/train_demo_model.py prepare --books books-train.parquet --work WORK
    python scripts/train_demo_model.py train --work WORK --minutes 95 [--device cuda]
    python scripts/train_demo_model.py export --work WORK --out hf_qep/demo_model
    python scripts/train_demo_model.py clean --books books-valid.parquet --out held-out.jsonl

`prepare` trains a byte-level BPE tokenizer and writes the corpus as one token array; `clean` writes other books in the
form of the training text, one per line, to measure on.  `train` may be stopped and started again: it continues from
WORK/state.pt.  The schedule is warm-up, constant, linear decay over *time*, because the recipe is "as strong as so many
minutes of this machine allow"; WORK/log.jsonl records what was really done.
The matrices of the blocks are trained by Muon (orthogonalised momentum, Keller Jordan 2024), in float32 because the
bfloat16 Newton-Schulz iteration of torch.optim.Muon is slower than the model on CPUs without bfloat16 units.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch

VOCAB_SIZE = 2048
SPECIAL = ["<PAD>", "<BOS_TOKEN>", "<EOS_TOKEN>"]
PAD, BOS, EOS = range(3)
EARLIEST_YEAR = 1800  # older spelling costs a model of this size more than the text teaches it


def clean(text: str) -> str:
    """Body of one Markdown book: no header, one line per paragraph."""
    text = text.replace("\r\n", "\n").partition("\n-------\n")[2] or text
    text = re.sub(r"[#*_]+", "", text)
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    text = text.translate(str.maketrans("“”‘’—", "\"\"''-"))
    return re.sub(r"[ \t]+", " ", re.sub(r"\n\s*", "\n", text)).strip()


def year_of(text: str) -> int:
    found = re.search(r"## Year: (\d{4})", text)
    return int(found.group(1)) if found else 0


def prepare(args: argparse.Namespace) -> None:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rows = pq.read_table(args.books).to_pylist()
    texts = [clean(r["text"]) for r in rows if year_of(r["text"]) >= EARLIEST_YEAR]
    print(f"{len(texts)} of {len(rows)} books, {sum(map(len, texts)) / 1e6:.1f} M characters")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((t[i : i + 4000] for t in texts for i in range(0, len(t), 40000)), trainer)
    chunks = (c for t in texts for c in re.split(r"(?<=\n)(?=.)", t))
    ids: list[np.ndarray] = []
    batch: list[str] = []
    for chunk in chunks:
        batch.append(chunk)
        if len(batch) == 20000:
            ids += [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(batch)]
            batch = []
    ids += [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(batch)]
    tokens = np.concatenate(ids)
    args.work.mkdir(parents=True, exist_ok=True)
    np.save(args.work / "tokens.npy", tokens)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<BOS_TOKEN> $A", pair="<BOS_TOKEN> $A $B", special_tokens=[("<BOS_TOKEN>", BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS]
    ).save_pretrained(args.work / "tokenizer")
    print(f"{len(tokens) / 1e6:.1f} M tokens")


def clean_books(args: argparse.Namespace) -> None:
    import pyarrow.parquet as pq

    texts = [
        clean(row["text"]) for row in pq.read_table(args.books).to_pylist() if year_of(row["text"]) >= EARLIEST_YEAR
    ]
    args.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def build_model() -> torch.nn.Module:
    from transformers import Cohere2Config, Cohere2ForCausalLM

    config = Cohere2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=128,
        logit_scale=0.25,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    return Cohere2ForCausalLM(config)


def orthogonalise(m: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrix by five quintic Newton-Schulz steps; `m` (count, rows, cols) float32."""
    x = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; matrices of one shape are stacked into one batched product."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                updates = orthogonalise(
                    torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                )
                scale = 0.2 * max(shape) ** 0.5  # update size of AdamW, so one learning rate serves both
                for p, u in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"] * scale)


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    return [
        Muon(matrices, lr=2e-3),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    """Learning-rate factor: 1 % warm-up, constant, then linear decay over the last 40 % of the time."""
    return min(1.0, progress / 0.01 + 0.01, max(0.0, (1 - progress) / 0.4))


def batch_of(tokens: np.ndarray, generator: np.random.Generator, rows: int, length: int) -> torch.Tensor:
    starts = generator.integers(0, len(tokens) - length, rows)
    batch = np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)
    batch[::2, 0] = BOS  # every other window starts like a document
    return torch.from_numpy(batch)


def train(args: argparse.Namespace) -> None:
    tokens = np.load(args.work / "tokens.npy", mmap_mode="r")
    model = build_model().to(args.device)
    opts = optimizers(model)
    base = [o.param_groups[0]["lr"] for o in opts]
    step, elapsed, state_file = 0, 0.0, args.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        step, elapsed = state["step"], state["elapsed"]
    total, smooth, saved = args.minutes * 60, None, time.time()
    while elapsed < total:
        began = time.time()
        progress = elapsed / total
        rows, length = (16, 512) if progress > 0.85 else (32, 256)
        x = batch_of(tokens, np.random.default_rng(step), rows, length).to(args.device)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, lr in zip(opts, base, strict=True):
            o.param_groups[0]["lr"] = lr * rate(progress)
            o.step()
        model.zero_grad()
        step += 1
        elapsed += time.time() - began
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            line = {"step": step, "tokens": step * 8192, "minutes": round(elapsed / 60, 2), "loss": round(smooth, 4)}
            with (args.work / "log.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
        if time.time() - saved > 120 or elapsed >= total:
            state = {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step}
            torch.save(state | {"elapsed": elapsed}, str(state_file) + ".new")
            os.replace(str(state_file) + ".new", state_file)
            saved = time.time()


def export(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    state = torch.load(args.work / "state.pt", weights_only=True)
    model = build_model()
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.work / "tokenizer").save_pretrained(args.out)
    (args.out / "train_log.jsonl").write_bytes((args.work / "log.jsonl").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(required=True)
    commands = {
        "prepare": (prepare, ["books", "work"]),
        "train": (train, ["work"]),
        "export": (export, ["work", "out"]),
        "clean": (clean_books, ["books", "out"]),
    }
    for name, (function, flags) in commands.items():
        p = sub.add_parser(name)
        for flag in flags:
            p.add_argument(f"--{flag}", type=Path, required=True)
        if function is train:
            p.add_argument("--minutes", type=float, default=95)
            p.add_argument("--device", default="cpu")
        p.set_defaults(run=function)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
