"""The tokenizer that Vicuna was trained with: the slow Llama tokenizer of transformers 4.28, over sentencepiece.

It is here because the rules around special tokens decide ids, and later tokenizers follow other rules: special
tokens are cut out of the text first, and every chunk between them is encoded alone, with its own leading "▁".
"""

import re
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor

from minigpt4.common.errors import UserError
from minigpt4.common.utils import parse_json

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class BatchEncoding(dict):
    """``input_ids`` and ``attention_mask`` with attribute access, movable to a device."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to(self, device: torch.device | str) -> "BatchEncoding":
        """Moves both tensors."""
        return BatchEncoding({name: value.to(device) for name, value in self.items()})


class LlamaTokenizer:
    """Text to ids and back. ``pad_token`` may be set, as the reference does (``pad_token = eos_token``).

    Args:
        folder: a Hugging Face model folder with ``tokenizer.model`` and, optionally,
            ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.
    """

    padding_side = "right"

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.sp_model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._added: dict[str, int] = _read_json(folder / "added_tokens.json")
        config, roles = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "special_tokens_map.json")
        for entry_id, entry in config.get("added_tokens_decoder", {}).items():
            if int(entry_id) >= len(self.sp_model):
                self._added.setdefault(entry["content"], int(entry_id))
        self._strips: dict[str, bool] = {}  # special token -> does it swallow the spaces beside it
        for role, default in zip(_ROLES, ("<s>", "</s>", "<unk>", None), strict=True):
            token = roles.get(role, config.get(role)) or default
            # A token written as plain text swallows spaces, one written as a record says whether it does.
            strips = isinstance(token, str) and (role in roles or role == "pad_token")
            token = token["content"] if isinstance(token, dict) else token
            setattr(self, role, token)
            if token is not None:
                if self.sp_model.piece_to_id(token) == self.sp_model.unk_id() and token != default:
                    self._added.setdefault(token, len(self))
                self._strips[token] = strips
        for token in self._added:
            self._strips.setdefault(token, True)
        for token in self._strips:
            if not token.encode():  # which raises for half a surrogate pair
                raise ValueError("a special token has no letters")
        for token, token_id in self._added.items():
            if type(token_id) is not int or token_id < 0:
                raise ValueError(f"the added token '{token}' has the id {token_id!r}")
        self._added_names = {token_id: token for token, token_id in self._added.items()}
        self._split = re.compile(
            "(" + "|".join(re.escape(t) for t in sorted(self._strips, key=len, reverse=True)) + ")"
        )

    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str | None

    def __len__(self) -> int:
        return len(self.sp_model) + len(self._added)

    @property
    def vocab_size(self) -> int:
        """Number of sentencepiece pieces, added tokens not counted."""
        return len(self.sp_model)

    @property
    def bos_token_id(self) -> int:
        """Id of the token that opens every sequence."""
        return self.convert_tokens_to_ids(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a sequence."""
        return self.convert_tokens_to_ids(self.eos_token)

    @property
    def unk_token_id(self) -> int:
        """Id of the unknown token."""
        return self.convert_tokens_to_ids(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, or None where none is set."""
        return None if self.pad_token is None else self.convert_tokens_to_ids(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the begin, end, unknown, padding and added tokens."""
        return sorted({self.convert_tokens_to_ids(token) for token in self._strips})

    def convert_tokens_to_ids(self, token: str) -> int:
        """Id of one piece or added token; the unknown id where there is none."""
        return self._added.get(token, self.sp_model.piece_to_id(token))

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text, special tokens cut out first."""
        return [self._piece(token_id) for token_id in self.encode(text, add_special_tokens=False)]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the begin token in front where ``add_special_tokens``."""
        ids = [self.bos_token_id] if add_special_tokens else []
        chunks = self._split.split(text)  # text, special, text, special, …, text
        for i, chunk in enumerate(chunks):
            if i % 2:
                ids.append(self.convert_tokens_to_ids(chunk))
                continue
            if i > 0 and self._strips[chunks[i - 1]]:
                chunk = chunk.lstrip()
            if i + 1 < len(chunks) and self._strips[chunks[i + 1]]:
                chunk = chunk.rstrip()
            ids.extend(self.sp_model.encode(chunk))
        return ids

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of a list or tensor of ids [T]; special tokens stay in it unless skipped."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        ids = [token_id for token_id in ids if token_id < len(self)]  # an LM may have rows that no token uses
        special = set(self.all_special_ids)
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in special]
        parts: list[str] = []  # added tokens and the stretches between them are joined by a space
        stretch: list[int] = []
        for token_id in ids:
            if token_id in self._added_names:
                parts += [self._decode_stretch(stretch, special)] if stretch else []
                parts.append(self._added_names[token_id])
                stretch = []
            else:
                stretch.append(token_id)
        parts += [self._decode_stretch(stretch, special)] if stretch else []
        return " ".join(parts)

    def _decode_stretch(self, ids: list[int], special: set[int]) -> str:
        text, run, previous_is_special = "", [], False
        for i, token_id in enumerate(ids):
            if token_id not in special:
                run.append(token_id)
                previous_is_special = False
                continue
            space = "" if previous_is_special or i == 0 else " "
            text += space + self.sp_model.decode(run) + self._piece(token_id)
            run, previous_is_special = [], True
        return text + self.sp_model.decode(run)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """``decode`` row by row."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def __call__(
        self,
        text: str | list[str],
        return_tensors: str | None = None,
        padding: str | bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Encodes one text or several.

        Returns:
            ``input_ids`` and ``attention_mask``: lists, or with ``return_tensors="pt"`` tensors [B, T], padded on
            the right with ``pad_token``. An empty text alone gives a float32 tensor [1, 0], as it always did.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is '{return_tensors}'; expected None or 'pt'.")
        rows = [self.encode(t, add_special_tokens) for t in ([text] if isinstance(text, str) else text)]
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding:
            if self.pad_token_id is None:
                raise ValueError("Padding needs a pad_token; set tokenizer.pad_token = tokenizer.eos_token.")
            width = max_length if padding == "max_length" and max_length else max(map(len, rows))
            masks = [mask + [0] * (width - len(mask)) for mask in masks]
            rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        if return_tensors == "pt":
            return BatchEncoding(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))
        single = isinstance(text, str)
        return BatchEncoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)

    def _piece(self, token_id: int) -> str:
        return self._added_names.get(token_id) or self.sp_model.id_to_piece(token_id)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Llama-family folder, with a pad token.

    Folders with a ``tokenizer.model`` get the class above; later ones (``tokenizer.json`` only) transformers' own.

    Raises:
        UserError: the folder has neither file, or the tokenizer lacks a begin or end token.
    """
    folder = Path(folder)
    is_slow = (folder / "tokenizer.model").is_file()
    if not is_slow and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"model.llama_model: {folder} holds neither tokenizer.model nor tokenizer.json; "
            "copy the tokenizer files of the same model there."
        )
    try:
        if is_slow:
            tokenizer: Any = LlamaTokenizer(folder)
        else:
            from transformers import AutoTokenizer  # heavy, and only this branch needs it

            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever sentencepiece and transformers make of strange files
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(
            f"model.llama_model: the tokenizer in {folder} cannot be read ({cause}); copy its files again."
        ) from error
    for role in ("bos_token", "eos_token"):
        token, token_id = getattr(tokenizer, role), getattr(tokenizer, f"{role}_id")
        # A token that no piece stands for is read as the unknown one.
        if token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
            raise UserError(
                f"model.llama_model: the tokenizer in {folder} has no {role}_id (its {role} is '{token}'); "
                "MiniGPT-4 needs one. Take the tokenizer files that came with the model."
            )
    tokenizer.pad_token = tokenizer.eos_token  # as in the reference: padding is told apart by the attention mask
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return parse_json(path.read_bytes(), f"model.llama_model: {path}")
