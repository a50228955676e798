"""Training on answers that are given during the training."""

from dataclasses import dataclass

from vsd.errors import ConfigurationError


@dataclass
class OnlineOptions:
    """online training

    Attributes:
        online: answer the prompts of the data during the training, with the drafter as it is then, and train on these
            answers; recorded answers are not used. It needs --drafter
        answer_tokens: longest answer in tokens
        answer_temperature: sampling temperature of the answers; by default --temperature. At 0 a prompt is answered
            once, above 0 in every epoch anew
        answer_tree: draft tree that the prompts are answered with, depth x top_k x nodes; none: plain decoding, which
            is faster where many prompts fill the device
        round_prompts: prompts that are answered together, by all processes
        replay: how often an answer is trained on, on average
        buffer: newest answers that are trained on
    """

    online: bool = False
    answer_tokens: int = 256
    answer_temperature: float | None = None
    answer_tree: str = "3"
    round_prompts: int = 32
    replay: float = 2.0
    buffer: int = 2048

    def check(self) -> None:
        """Refuse values without meaning.

        Raises:
            ConfigurationError: naming the option and what it takes.
        """
        for name, fits, wanted in (
            ("answer_tokens", self.answer_tokens >= 2, "at least 2"),
            ("answer_temperature", (self.answer_temperature or 0) >= 0, "0 or more"),
            ("round_prompts", self.round_prompts >= 1, "at least 1"),
            ("replay", self.replay > 0, "positive"),
            ("buffer", self.buffer >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigurationError(f"{name} must be {wanted}, not {getattr(self, name)}")
