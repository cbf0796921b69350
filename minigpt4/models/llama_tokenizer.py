"""The tokenizer of the language model, with the rules that Vicuna was trained with.

Folders with a ``tokenizer.model`` get transformers' SentencePiece tokenizer in its legacy mode: special tokens are
split out first, and every chunk between them is encoded alone with a leading "▁". Other folders get their own fast
tokenizer.
"""

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers.tokenization_utils_base import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from minigpt4.common.errors import UserError
from minigpt4.common.utils import read_json_object
from minigpt4.models import fast_tokenizer

KEY = "model.llama_model"
FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")  # of which a folder needs one
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class LlamaTokenizer(SentencePieceBackend):
    """The slow Llama tokenizer of transformers 4.28: its ids and its decoded text, added tokens included."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        config, roles, added = (read_json_object(folder / name, KEY) for name in names)
        vocabulary = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        special = {}
        for role in (*_DEFAULTS, "pad_token"):
            default = _DEFAULTS.get(role)
            if default is not None and vocabulary.id_to_piece(vocabulary.piece_to_id(default)) != default:
                default = None
            token = roles.get(role, config.get(role)) or default
            # A token written as plain text strips the spaces beside it, one written as a record says whether it does.
            is_stripping = isinstance(token, str) and (role in roles or role == "pad_token")
            token = token["content"] if isinstance(token, dict) else token
            if token is not None:
                special[role] = AddedToken(_checked(token), lstrip=is_stripping, rstrip=is_stripping, special=True)
        decoder = config.get("added_tokens_decoder", {})
        added = {entry["content"]: int(number) for number, entry in decoder.items()} | added
        for token, number in added.items():
            if type(number) is not int or number < 0 or not _checked(token):
                raise ValueError(f"the added token '{token}' has the id {number!r}")
        tokens = {number: AddedToken(token, lstrip=True, rstrip=True, special=True) for token, number in added.items()}
        tokens |= {added[str(token)]: token for token in special.values() if str(token) in added}
        super().__init__(
            vocab_file=str(folder / "tokenizer.model"),
            legacy=True,
            added_tokens_decoder=tokens,
            special_tokens_pattern="bos" if "bos_token" in special else "none",
            clean_up_tokenization_spaces=False,
            chat_template=config.get("chat_template"),
            **special,
        )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins pieces to text: special tokens keep their places, added ones are separated by spaces."""
        special, known = set(self.all_special_tokens), self.added_tokens_encoder
        parts: list[str] = []  # added tokens beyond the vocabulary, and the text between them
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in special and token not in known:
                run.append(token)
                continue
            decoded, has_run, run = self.sp_model.decode(run), bool(run), []
            if token is None or known.get(token, 0) >= self.vocab_size:
                parts += [part for part in (text + decoded, token) if part]
                text = ""
            else:
                text += f"{' ' * has_run}{decoded}{token}"
        return " ".join(parts)


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the tokenizer of a model folder and sets its pad token to the end token, as the reference does.

    Raises UserError if the folder has no tokenizer files, they are damaged, or there is no end token.
    """
    folder = Path(folder)
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    if not any((folder / name).is_file() for name in FILES):
        problem = f"{folder} holds neither tokenizer.model nor tokenizer.json"
        raise UserError(f"{KEY}: {problem}; copy the tokenizer files of the same model there.")
    try:
        if is_sentencepiece:
            tokenizer: Any = LlamaTokenizer(folder)
        else:
            tokenizer = fast_tokenizer.load(folder, KEY)
    except UserError:
        raise
    except Exception as error:  # sentencepiece and transformers raise many kinds for damaged files
        cause = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{KEY}: the tokenizer in {folder} cannot be read ({cause}); copy its files again.") from error
    for role in ("eos_token", "bos_token"):
        token, token_id = getattr(tokenizer, role), getattr(tokenizer, f"{role}_id")
        is_missing = token is None if role == "bos_token" else token_id is None
        # A token that has no piece of its own is encoded as the unknown one.
        is_unknown = not is_missing and token_id == tokenizer.unk_token_id and token != tokenizer.unk_token
        if is_unknown or (is_missing and role == "eos_token"):
            problem = f"the tokenizer in {folder} has no {role}_id (its {role} is '{token}')"
            raise UserError(f"{KEY}: {problem}; MiniGPT-4 needs it. Take the tokenizer files of the same model.")
    tokenizer.pad_token = tokenizer.eos_token  # padding is recognised by the attention mask
    return tokenizer


def _checked(token: str) -> str:
    if not token.encode():  # which raises for half a surrogate pair
        raise ValueError("a special token is empty")
    return token
