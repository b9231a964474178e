"""Prompts become token ids. Text is encoded with special tokens switched off, so no text can produce one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from index.errors import BrewlineError
from retrieval.prompts import PAD, Prompt, apart


class TokenizerError(BrewlineError):
    """A tokenizer file is missing or lacks a token that prompts need."""


class Tokens:
    """A tokenizer that packs prompts as ids: the field token's id, then the ids of the plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self._id = tokenizer.get_vocab(with_added_tokens=True)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int, specials: Sequence[str]) -> Tokens:
        """A byte-level BPE of at most `vocabulary` entries (special tokens included) learned from plain texts.

        Case is folded: a model that starts from scratch cannot afford to learn each word twice.
        """
        tokenizer = Tokenizer(models.BPE(byte_fallback=False))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=max(vocabulary, len(specials) + 256),
            min_frequency=2,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> Tokens:
        """The tokenizer of a model folder (`tokenizer.json`). Raises TokenizerError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: not found; expected a model folder with a tokenizer.json")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises a bare Exception for any unreadable file
            raise TokenizerError(f"{path}: cannot be read as a tokenizer ({error})") from error

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, as sentence-transformers and transformers read it."""
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def add(self, specials: Sequence[str]) -> None:
        """Adds special tokens to a tokenizer that came with a checkpoint, and drops what it would add by itself."""
        self.tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
        # A BOS per text would sit inside every item of a packed sequence.
        self.tokenizer.post_processor = None
        self._id = self.tokenizer.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def id(self, token: str) -> int:
        """The id of one special token. Raises TokenizerError if the tokenizer lacks it."""
        if token not in self._id:
            raise TokenizerError(f"the tokenizer has no token {token!r}; it was made for another prompt template or quantizer")
        return self._id[token]

    @property
    def special(self) -> list[str]:
        """Every special token, in order of id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return [added[number].content for number in sorted(added) if added[number].special]

    @property
    def pad(self) -> int:
        """The id that fills the end of shorter rows."""
        return self.id(PAD)

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, never a special token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def text(self, ids: Sequence[int]) -> str:
        """The ids as a person reads them: nothing but the id of a special token shows as one.

        Plain ids may spell one, as a tokenizer folds look-alikes ("\uff1c" into "<") after `neutralise` saw the text.
        """
        added = self.tokenizer.get_added_tokens_decoder()
        shown = []
        for special, run in itertools.groupby(ids, added.__contains__):
            words = self.tokenizer.decode(list(run), skip_special_tokens=False)
            shown.append(words if special else apart(words))
        return "".join(shown)

    def ids(self, prompt: Prompt) -> list[int]:
        """Ids of one prompt."""
        return self.many([prompt])[0]

    def many(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of each prompt, every distinct text encoded once."""
        texts = list({part.text: None for prompt in prompts for part in prompt if part.text})
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids_of: dict[str, list[int]] = {text: encoding.ids for text, encoding in zip(texts, encodings)}
        ids_of[""] = []
        found = []
        for prompt in prompts:
            ids: list[int] = []
            for part in prompt:
                ids.append(self.id(part.token))
                ids += ids_of[part.text]
            found.append(ids)
        return found


def keep_newest(entries: Sequence[Sequence[int]], budget: int) -> list[Sequence[int]]:
    """The newest entries (the last ones) whose lengths together fit the budget, still oldest first."""
    kept, used = [], 0
    for entry in reversed(entries):
        used += len(entry)
        if used > budget:
            break
        kept.append(entry)
    return kept[::-1]
