"""SentencePiece's vocabularies (Llama 2, Mistral 7B), by its own package, which is optional.

They are no byte-level BPE: pieces are of characters, a space is a character, and what has no piece is written
in bytes. So tiktoken cannot encode them, and `Tokenizer` asks this class instead.
"""
from typing import Any

from runtime.options import UserError

TRIALS = ("  a  b \n\tx", "ﬁ Å ﷺ e\u0301", "<s> </s>")  # a normaliser would change them


class SentencePieces:
    """Stands in for tiktoken's Encoding.

    The package puts a space before every text. We do not: a reply that follows a prompt is encoded as it
    stands, and decodes to itself. So a text's first word has the piece that it has after a line break.
    """

    def __init__(self, model: bytes):
        try:
            import sentencepiece
        except ImportError:
            raise UserError("this vocabulary is SentencePiece's: install its package, `pip install sentencepiece`"
                            ) from None
        try:
            self.processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._head = self.processor.encode("\n")  # the space that it puts first, and the line break
        except Exception:  # errors of its own, of several kinds
            raise UserError("tokenizer.model is damaged, or no file of SentencePiece's: fetch it again") from None

    def encode(self, text: str, disallowed_special: tuple = ()) -> list[int]:
        """Ids of the text. A line break before it keeps the package's own space away from it."""
        return self.processor.encode("\n" + text)[len(self._head):]

    def tokens(self) -> tuple[dict[int, bytes], dict[str, int]]:
        """(the bytes of the ordinary pieces, control tokens' ids); UserError for a vocabulary that changes
        texts, or merges line breaks with what follows them."""
        p, ordinary, control = self.processor, {}, {}
        for i in range(p.vocab_size()):
            piece = p.id_to_piece(i)
            if p.is_control(i) or p.is_unknown(i):
                control[piece] = i
            elif p.is_byte(i):
                ordinary[i] = bytes([int(piece[3:5], 16)])
            elif not p.is_unused(i):
                ordinary[i] = piece.replace("▁", " ").encode()
        if any(b"\n" in token and token != b"\n" for token in ordinary.values()):
            raise UserError("tokenizer.model: pieces hold line breaks beside other characters, which Mosslet cannot "
                            "encode")
        for text in TRIALS:
            if b"".join(ordinary.get(i, b"") for i in self.encode(text)) != text.encode():
                raise UserError(f"tokenizer.model: it changes texts, such as {text!a}, or lacks bytes for what has no "
                                "piece: Mosslet reads vocabularies without a normaliser, such as Llama 2's")
        return ordinary, control
