"""The encoder folder: complete, refused when it is not, and the same vectors however they are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from index.errors import BrewlineError
from retrieval.data.schema import Dataset, Engagement, Item, Member, MemberView
from retrieval.encoder import FACTS, Encoder, EncoderError, Pooling, save_encoder
from retrieval.features import Quantizer
from retrieval.fingerprint import MissingPart
from retrieval.llama import CheckpointError, Size, add_lora, load_llama, merge_lora, new_llama, smooth_buckets
from retrieval.prompts import item_prompt, number_words, render
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

SMALL = Size(hidden=32, layers=2, heads=4, kv_heads=2, mlp=64)


@pytest.fixture(scope="module")
def folder(tiny_tokens: Tokens, tiny_quantizer: Quantizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = new_llama(SMALL, len(tiny_tokens), causal_lm=False)
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(path, model, Writer(tiny_tokens, tiny_quantizer, Budgets(), ("like",)), {"seed": 1})
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.load(folder)


def records(dataset: Dataset) -> tuple[list[Item], dict[str, np.ndarray]]:
    items = [dataset.items[row] for row in range(12)]
    return items, {"n_7d": np.linspace(0, 9, 12), "age_days": np.full(12, np.nan)}


def test_vectors_are_unit_and_independent_of_batch_and_order(encoder: Encoder, tiny_dataset: Dataset) -> None:
    items, numbers = records(tiny_dataset)
    whole = encoder.items(items, numbers)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    single = np.concatenate(
        [encoder.items([item], {name: c[n : n + 1] for name, c in numbers.items()}) for n, item in enumerate(items)]
    )
    np.testing.assert_allclose(whole, single, atol=2e-6)
    back = encoder.items(items[::-1], {name: column[::-1] for name, column in numbers.items()})
    np.testing.assert_allclose(whole, back[::-1], atol=2e-6)


def test_sentence_transformers_opens_the_folder_and_gives_the_same_vectors(
    folder: Path, encoder: Encoder, tiny_dataset: Dataset
) -> None:
    items, numbers = records(tiny_dataset)
    words = number_words(encoder.writer.quantizer, numbers, len(items))
    texts = [render(item_prompt(item, row)) for item, row in zip(items, words)]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, encoder.items(items, numbers), atol=2e-6)


def test_a_number_changes_the_digest_exactly_when_its_bucket_changes(encoder: Encoder, tiny_dataset: Dataset) -> None:
    item = [tiny_dataset.items[0]]
    bucket = encoder.writer.quantizer.bucket("n_7d", np.array([1.0, 1.0 + 1e-9, 50.0]))
    digests = [encoder.item_digests(item, {"n_7d": np.array([value])})[0] for value in (1.0, 1.0 + 1e-9, 50.0)]
    assert (digests[0] == digests[1]) == (bucket[0] == bucket[1])
    assert bucket[0] != bucket[2] and digests[0] != digests[2]


def test_members_without_history_or_profile_have_a_vector(encoder: Encoder) -> None:
    views = [
        MemberView(Member("new")),
        MemberView(Member("known", {"role": "coffee"}), [Engagement(Item("i", "beans"), 1, "like")]),
    ]
    assert np.isfinite(encoder.members(views)).all()
    assert encoder.items([], {}).shape == (0, 32)


@pytest.mark.parametrize("name", ["encoder.json", "quantizer.json", "tokenizer.json", "config.json", "model.safetensors"])
def test_a_changed_part_changes_the_fingerprint_and_a_missing_one_is_named(
    folder: Path, encoder: Encoder, name: str, tmp_path: Path
) -> None:
    from retrieval.encoder import stored_fingerprint

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with (copy / name).open("ab") as file:
        file.write(b" ")
    assert stored_fingerprint(copy) != encoder.fingerprint == stored_fingerprint(folder)
    (copy / name).unlink()
    with pytest.raises(BrewlineError, match=name.replace(".", r"\.")):
        Encoder.load(copy)


def test_facts_of_another_version_are_refused_with_both_values(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    facts = json.loads((copy / FACTS).read_text()) | {"pooling": "first"}
    (copy / FACTS).write_text(json.dumps(facts))
    with pytest.raises(EncoderError, match="pooling is 'first', this version reads 'mean' or 'last' or 'mean\\+last'"):
        Encoder.load(copy)
    with pytest.raises(EncoderError, match=r"no encoder\.json"):
        Encoder.load(tmp_path)
    (copy / FACTS).unlink()
    with pytest.raises(MissingPart, match=r"encoder\.json"):
        from retrieval.encoder import stored_fingerprint

        stored_fingerprint(copy)


def test_bucket_tokens_start_on_a_line(tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    torch.manual_seed(0)
    model = new_llama(SMALL, len(tiny_tokens), causal_lm=False)
    smooth_buckets(model, tiny_tokens, tiny_quantizer)
    weight = model.get_input_embeddings().weight.detach()
    line = torch.stack([weight[tiny_tokens.id(f"<|n_7d:{bucket}|>")] for bucket in (1, 50, 51, 100)])
    assert (line[1] - line[2]).norm() < 0.05 * (line[0] - line[3]).norm()


def test_lora_merges_into_the_same_function() -> None:
    torch.manual_seed(0)
    model = new_llama(SMALL, 50, causal_lm=False).eval()
    add_lora(model, rank=4)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad and "_proj" in name]
    assert trainable and all(name.endswith((".up", ".down")) for name in trainable)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".up"):
                weight.normal_(std=0.1)
    ids = torch.arange(20).reshape(2, 10)
    before = model(input_ids=ids).last_hidden_state
    merge_lora(model)
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, before, atol=1e-5, rtol=1e-5)
    assert not any("base" in name for name, _ in model.named_parameters())


def test_a_folder_that_is_no_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable LLaMA checkpoint"):
        load_llama(tmp_path, causal_lm=False)
    whole = new_llama(SMALL, 50, causal_lm=False)
    whole.save_pretrained(tmp_path / "torn")
    weights = (tmp_path / "torn" / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="no usable LLaMA checkpoint"):
        load_llama(tmp_path / "torn", causal_lm=False)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'; expected the LLaMA family"):
        load_llama(tmp_path, causal_lm=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's exporter warns about itself
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_the_onnx_query_side_gives_the_same_vectors(encoder: Encoder, tmp_path: Path, pooling: str) -> None:
    from retrieval.export import ExportError, OnnxQuery, export_query, parity

    encoder = Encoder(encoder.model, encoder.writer, encoder.fingerprint, {"pooling": pooling})
    export_query(encoder, tmp_path / "query.onnx")
    assert parity(encoder, tmp_path / "query.onnx") < 1e-5
    other = Encoder(encoder.model, encoder.writer, "another", {})
    with pytest.raises(ExportError, match=f"from encoder {encoder.fingerprint}, expected another"):
        OnnxQuery(tmp_path / "query.onnx", other)


@pytest.mark.parametrize("pooling", ["last", "mean+last"])
def test_the_last_state_is_read_the_same_everywhere_and_short_vectors_are_the_front_of_long_ones(
    tiny_tokens: Tokens, tiny_quantizer: Quantizer, tiny_dataset: Dataset, tmp_path: Path, pooling: Pooling
) -> None:
    torch.manual_seed(2)
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(), ("like",))
    save_encoder(tmp_path, new_llama(SMALL, len(tiny_tokens), causal_lm=False), writer, {}, pooling=pooling, matryoshka=(8, 16))
    encoder = Encoder.load(tmp_path)
    items, numbers = records(tiny_dataset)
    whole = encoder.items(items, numbers)
    texts = [render(item_prompt(item, row)) for item, row in zip(items, number_words(tiny_quantizer, numbers, len(items)))]
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path), device="cpu").encode(texts), whole, atol=2e-6)
    assert encoder.facts["matryoshka"] == [8, 16] and encoder.facts["pooling"] == pooling
    short = encoder.truncated(8)
    front = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short.items(items, numbers), front, atol=1e-6)
    assert short.dims == 8 and short.fingerprint != encoder.fingerprint
    with pytest.raises(EncoderError, match="64 dims were asked for; this encoder has 32"):
        encoder.truncated(64)


def test_an_encoder_of_whole_histories_is_not_served(tiny_tokens: Tokens, tiny_quantizer: Quantizer, tmp_path: Path) -> None:
    writer = Writer(tiny_tokens, tiny_quantizer, Budgets(), ("like",), whole=True)
    save_encoder(tmp_path, new_llama(SMALL, len(tiny_tokens), causal_lm=False), writer, {})
    with pytest.raises(EncoderError, match="reads every action of a member"):
        Encoder.load(tmp_path)
    assert Encoder.load(tmp_path, whole_log=True).writer.whole
