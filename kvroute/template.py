"""A model's chat template, as the engine would render it."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from kvkeep.errors import ConfigError
from kvroute.request import Body

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "read_template"]


class ChatTemplate:
    """Renders messages to the text of a prompt. `names`: special tokens, which templates write."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        """Raises ConfigError on a template that cannot be read."""
        try:
            import jinja2.sandbox
        except ImportError as error:
            raise ConfigError("--tokenizer needs jinja2 for chats: pip install tokenizers jinja2") from error
        self._error = jinja2.TemplateError
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
        environment.globals.update(raise_exception=self._refuse, strftime_now=_now, **names)
        try:
            self._template: jinja2.Template = environment.from_string(source)
        except self._error as error:
            raise ConfigError(f"the chat template cannot be read: {error}") from error

    def render(self, body: Body) -> str | None:
        """The prompt's text; None where the template refuses, or what is asked has more than text in it."""
        try:
            messages = msgspec.json.decode(body.messages, type=list[dict[str, Any]])
            given = {"tools": msgspec.json.decode(body.tools)}
            given |= msgspec.json.decode(body.chat_template_kwargs) or {}
            for message in messages:
                message["content"] = _text(message.get("content"))
            return self._template.render(messages=messages, add_generation_prompt=True, **given)
        except (self._error, msgspec.DecodeError, TypeError, ValueError, LookupError):
            return None

    def _refuse(self, why: str) -> NoReturn:
        raise self._error(why)


def read_template(folder: Path) -> ChatTemplate | None:
    """The chat template beside a tokenizer; None: there is none. Raises ConfigError on one that is broken."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except OSError:
        settings = {}
    except ValueError as error:
        raise ConfigError(f"{folder / 'tokenizer_config.json'} is no JSON: {error}") from error
    source = settings.get("chat_template")
    if isinstance(source, list):
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if (beside := folder / "chat_template.jinja").exists():
        source = beside.read_text(encoding="utf-8")
    if source is None:
        return None
    tokens = {name: value for name, value in settings.items() if name.endswith("_token") and value}
    names = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    return ChatTemplate(source, names)


def _text(content: Any) -> Any:
    """A message's content as text. Raises ValueError on what is none, an image say."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise ValueError("more than text")
    return "\n".join(part["text"] for part in content)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
