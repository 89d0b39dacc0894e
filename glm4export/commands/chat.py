"""``glm4export chat``: a conversation on the terminal.

It has a Session, not an Engine: nothing else is answered beside it, a session runs on every target, and its cache holds
the conversation in place, so a next turn computes what is new in it and nothing is copied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from glm4export.commands.conversation import Conversation
from glm4export.commands.questions import ask, command_of
from glm4export.commands.rates import Rates
from glm4export.commands.sampling_options import add_answer_options, sampling_params
from glm4export.commands.session_options import add_session_options, load_session
from glm4runtime import signals
from glm4runtime.contract import UserError

if TYPE_CHECKING:
    from glm4runtime.generation import Generation
    from glm4runtime.sampling import SamplingParams
    from glm4runtime.session import Session
    from glm4runtime.text.assistant import AnswerDelta, AnswerParser

EXAMPLE = "example: glm4export chat glm-4-9b-int4 --temperature 0.6"

HELP = '''\
/system TEXT   have another system message; none without TEXT
/undo          take back the last question and its answer
/reset         forget the conversation, not the system message
/save FILE     write the conversation as JSON; /load FILE goes on with it
/help          this
A \\ at a line's end goes on with the next line, """ begins and ends several lines; a space in front of / sends it.
Ctrl-C ends an answer, Ctrl-D the conversation.'''

_DIM, _BRIGHT = "\x1b[2m", "\x1b[22m"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_answer_options(command, max_new_tokens=2048)
    add_session_options(command)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from glm4runtime.speculation import check_limit

    check_limit(arguments.lookup)
    params = sampling_params(arguments)
    adapter = None if arguments.adapter is None else str(arguments.adapter)
    files = None if adapter is None else {adapter: arguments.adapter}
    with (
        load_session(arguments, chat_template=arguments.chat_template, adapters=files) as session,
        signals.raised(),
    ):
        Chat(
            session,
            params,
            system=arguments.system,
            lookup=arguments.lookup,
            stop=arguments.stop,
            adapter=adapter,
        ).converse()
    return 0


class Chat:
    """A session and what was said."""

    def __init__(
        self,
        session: Session,
        params: SamplingParams,
        *,
        system: str | None,
        lookup: int,
        stop: list[str],
        adapter: str | None,
    ) -> None:
        """Raises UserError where the bundle has no tokenizer or template, or can't stop on these."""
        from glm4runtime.text.stop import split_stop

        self._session, self._params, self._lookup, self._adapter = session, params, lookup, adapter
        self._stop_ids, self._stop_strings = split_stop(stop, session.tokenizer, session.manifest.vocab_size)
        self._conversation = Conversation(system)
        self._session.template.render([{"role": "user", "content": "x"}])  # now, not at the first question
        self._on_terminal = sys.stdin.isatty()

    def converse(self) -> None:
        """Take questions and commands from standard input until its end."""
        if self._on_terminal:
            print("/help tells the commands, Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                text = ask()
                if text.strip():
                    self._take(text)
            except EOFError:
                if self._on_terminal:
                    print()
                return
            except KeyboardInterrupt:  # what was typed is dropped
                if not self._on_terminal:
                    raise
                print()
            except UserError as error:
                if not self._on_terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)

    def _take(self, text: str) -> None:
        command = command_of(text)
        if command is None:
            self._answer(text.strip())
            return
        conversation, (name, argument) = self._conversation, command
        if name == "help":
            print(HELP)
        elif name == "reset":
            conversation.reset()
        elif name == "undo":
            if not conversation.undo():
                raise UserError("/undo: nothing was asked so far")
        elif name == "system":
            conversation.set_system(argument)
        elif name in ("save", "load"):
            if not argument:
                raise UserError(f"/{name}: expected a file's name")
            path = Path(argument).expanduser()
            (conversation.save if name == "save" else conversation.load)(path)
            print(f"{path}: {len(conversation.messages)} messages")
        else:
            raise UserError(f"/{name} is no command; /help tells them, and a space in front sends it as a question")

    def _answer(self, question: str) -> None:
        """Print an answer as it comes, until Ctrl-C."""
        conversation, rates, screen = self._conversation, Rates(), _Screen()
        conversation.ask(question)
        generation: Generation | None = None
        try:
            prompt = self._session.template.render(conversation.messages)
            parser = self._parser(prompt)
            generation = self._session.generate(
                prompt, self._params, lookup=self._lookup, stop=self._stop_ids, adapter=self._adapter
            )
            for token in generation:
                with signals.held():
                    rates.token()
                    screen.show(parser.push(token))
                if parser.stopped is not None:
                    break
            reason = "stop" if parser.stopped is not None else generation.finish_reason
        except KeyboardInterrupt:
            reason = None
        except UserError:
            conversation.undo()
            raise
        with signals.held():
            if generation is not None:
                screen.show(parser.finish(reason or "cancelled"))
            screen.end()
            conversation.answered(screen.content)
            if not screen.content:
                print("no answer came; the question is taken back", file=sys.stderr)
            if generation is not None:
                rates.tell(generation, reason)
        if reason is None and not self._on_terminal:
            raise KeyboardInterrupt

    def _parser(self, prompt: str) -> AnswerParser:
        from glm4runtime.text.assistant import AnswerParser
        from glm4runtime.text.turn import in_thought

        return AnswerParser(
            self._session.tokenizer, stop_strings=self._stop_strings, thinking=in_thought(prompt) or "auto"
        )


class _Screen:
    """Words as they are; thoughts dimmed on a terminal, and left out elsewhere."""

    def __init__(self) -> None:
        self.content = ""
        self._on_terminal = sys.stdout.isatty()
        self._dim = False

    def show(self, delta: AnswerDelta) -> None:
        if delta.thought and self._on_terminal:
            self._write(delta.thought if self._dim else _DIM + delta.thought)
            self._dim = True
        if delta.content:
            self._write(_BRIGHT + "\n\n" + delta.content if self._dim else delta.content)
            self._dim = False
            self.content += delta.content

    def end(self) -> None:
        self._write(_BRIGHT + "\n" if self._dim else "\n")

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
