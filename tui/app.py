"""The Textual app: a conversation with one model, kept on disk as it grows.

It knows what the user wants done and when; the threads are in `replies`, the widgets in `transcript`, `composer` and
`status`, the file in `store`. It never waits for a thread while it runs: `run` does so after the terminal is restored.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Label

from gptedge.config import SamplingParams
from gptedge.errors import GptEdgeError
from gptedge.tui import colours
from gptedge.tui.common import CONTINUATION, UNANSWERED, answer_to, changes_to_regenerate, dropped, is_command, one_line
from gptedge.tui.composer import Composer
from gptedge.tui.replies import BATCH_SECONDS, Ended, Loaded, Loader, LoadFailed, Reply, TextCame, join_all
from gptedge.tui.status import Facts, Status
from gptedge.tui.store import ChatFile, SavedChat, chats_folder
from gptedge.tui.transcript import AssistantMessage, Note, Transcript, UserMessage

if TYPE_CHECKING:
    from gptedge import Chat, Model, Result

LEAVE_SECONDS = 5.0
"""How long quitting waits for a thread: a token, or a part of a long prompt, may still be under way."""
ACTIONS = {"/new": "new", "/regenerate": "regenerate", "/quit": "quit"}
"""What commands that are typed do; keys do it too."""
KEYS = "Enter sends · Ctrl+J new line · Esc stops · Ctrl+R again · Ctrl+N new · Ctrl+Q quits"


class ChatApp(App[BaseException]):
    """Ends with None, or with the exception that ended it."""

    CSS_PATH = Path(__file__).with_name("app.tcss")
    TITLE = "gptedge"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop the reply", priority=True),
        Binding("ctrl+c", "interrupt", "Stop or quit", priority=True),
        Binding("ctrl+q", "quit", "Quit", priority=True),
        Binding("ctrl+r", "regenerate", "Answer again", priority=True),
        Binding("ctrl+n", "new", "New conversation", priority=True),
        Binding("pageup", "scroll('page_up')", priority=True),
        Binding("pagedown", "scroll('page_down')", priority=True),
        Binding("ctrl+up", "scroll('up')", priority=True),
        Binding("ctrl+down", "scroll('down')", priority=True),
        Binding("ctrl+home", "scroll('home')", priority=True),
        Binding("ctrl+end", "scroll('end')", priority=True),
    ]

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        name: str,
        file: ChatFile,
        system: str | None = None,
        params: SamplingParams | None = None,
        resumed: Sequence[dict[str, str]] = (),
        answer: colours.Answer | None = None,
    ) -> None:
        """`load` runs in a thread of its own. `resumed`: messages to go on from. `answer`: what the terminal said."""
        super().__init__()
        answer = answer or colours.Answer()
        self.register_theme(colours.theme(answer.background))
        self.theme = "gptedge"
        self._typed = answer.typed
        self._loader = Loader(load, self.post_message)
        self._model_name, self._system, self._params = name, system, params or SamplingParams()
        self._resumed = list(resumed)
        self.file = file
        self.model: Model | None = None
        self.chat: Chat | None = None
        self.reply: Reply | None = None
        self._shown: AssistantMessage | None = None
        """The reply under way."""
        self._replaced: AssistantMessage | None = None
        """The one it takes the place of, hidden until it is sure that it comes to its end."""
        self._asked: UserMessage | None = None
        self._next: Callable[[], None] | None = None
        self._leaving = False
        """What to do once the reply under way has been stopped."""

    # ---- the screen ----

    def compose(self) -> ComposeResult:
        yield Transcript()
        with Vertical(id="foot"):
            with Horizontal(id="box"):
                yield Label("›", id="prompt")
                yield Composer()
            yield Status(Facts(self._model_name, state="loading …"))

    @property
    def transcript(self) -> Transcript:
        return self.screen_stack[0].query_one(Transcript)

    @property
    def composer(self) -> Composer:
        return self.screen_stack[0].query_one(Composer)

    @property
    def status(self) -> Status:
        return self.screen_stack[0].query_one(Status)

    async def on_mount(self) -> None:
        self._catch_signals()
        self.composer.focus()
        self.composer.insert(self._typed)
        if self._resumed:
            await self._show_resumed()
        else:
            await self.transcript.add(Note(KEYS, classes="welcome"))
        self.call_after_refresh(self._loader.start)  # the window first: loading takes the processor

    async def _show_resumed(self) -> None:
        await self.transcript.show(self._resumed)
        for message in self._resumed:
            if message["role"] == "user":
                self.composer.remember(message["content"])
        if self._resumed and self._resumed[-1]["role"] == "user":
            await self.transcript.add(Note(UNANSWERED))

    # ---- loading ----

    async def on_loaded(self, event: Loaded) -> None:
        self.model = event.model
        try:
            self.chat = self._new_chat(event.model)
        except GptEdgeError as e:
            self.exit(e)
            return
        recipe = event.model.bundle.recipe
        recipe = "" if recipe == "unknown" else recipe
        self.status.set(state="", recipe=recipe, context_length=event.model.context_length)
        if event.model.chat_template.is_continuation:
            await self.transcript.add(Note(CONTINUATION))
        if self._asked is not None:  # sent while loading
            await self._start(self._asked.text)

    def _new_chat(self, model: Model) -> Chat:
        chat = model.chat(system=self._system, params=self._params)
        if self._resumed:
            chat.load_dict({"messages": self._resumed})
        return chat

    def on_load_failed(self, event: LoadFailed) -> None:
        self.exit(event.error)

    # ---- asking and answering ----

    async def on_composer_sent(self, event: Composer.Sent) -> None:
        if is_command(event.text):
            await self._obey(event.text)
        elif self.reply is not None or (self.chat is None and self._asked is not None):
            self.composer.give_back(event.text)
            self.status.flash("Esc stops the reply first" if self.reply else "still loading")
        else:
            await self._ask(event.text)

    async def _obey(self, command: str) -> None:
        if action := ACTIONS.get(command):
            await self.run_action(action)
        else:
            await self.transcript.add(Note(answer_to(command)))

    async def _ask(self, question: str) -> None:
        self._asked = UserMessage(question)
        await self.transcript.query(".welcome").remove()
        await self.transcript.add(self._asked)
        if self.chat is not None:
            await self._start(question)

    async def _start(self, question: str | None, **changes: object) -> None:
        """Let the model answer `question`, or the last one anew."""
        assert self.chat is not None
        self._shown = AssistantMessage()
        await self.transcript.add(self._shown)
        self.status.set(state="answering · Esc stops")
        self.reply = Reply(self.chat, question, self.post_message, self.file, **changes)
        self.reply.start()

    async def on_text_came(self, event: TextCame) -> None:
        if self._shown is not None and self._shown.text:
            self.set_timer(BATCH_SECONDS, self._show_text)
        else:
            await self._show_text()  # the first words at once

    async def _show_text(self) -> None:
        if self.reply is not None and self._shown is not None:
            await self._shown.append(self.reply.take())
            self.status.set(used_tokens=self.reply.chat.cached_tokens)

    async def on_ended(self, event: Ended) -> None:
        if self._leaving:
            return
        reply, shown = self.reply, self._shown
        assert reply is not None
        assert shown is not None
        if event.result is None:
            await self._take_back(reply, shown)
        else:
            await self._keep(event.result, shown)
        self.reply = self._shown = self._replaced = self._asked = None
        self.status.set(state="")
        for problem in (event.error, event.not_saved):
            if problem:
                await self.transcript.add(Note(one_line(problem), classes="error"))
        if event.news:
            await self.transcript.add(Note(event.news))
        following, self._next = self._next, None
        if following == self._regenerate and event.result is None and reply.question is not None:
            self.status.flash("your question is in the box")  # and the answer to the one before it is not meant
        elif following is not None:
            following()

    async def _keep(self, result: Result, shown: AssistantMessage) -> None:
        """The chat has taken the reply into its history."""
        shown.finish(result.text, _ending(result))
        if self._replaced is not None:
            await self._replaced.remove()
        used = result.usage.prompt_tokens + result.usage.completion_tokens
        times = result.timings
        if notice := dropped(result):
            await self.transcript.add(Note(notice))
        self.status.set(used_tokens=used, tokens_per_s=times.decode_tokens_per_s, ttft_ms=times.ttft_ms)

    async def _take_back(self, reply: Reply, shown: AssistantMessage) -> None:
        """The history is what it was before: let the screen say the same, and the user try again."""
        await shown.remove()
        if self._replaced is not None:
            self._replaced.display = True
        if self._asked is not None and reply.question is not None:
            await self._asked.remove()
            self.composer.give_back(reply.question)

    # ---- what keys do ----

    def action_stop(self) -> None:
        if self.reply is not None:
            self.reply.cancel()

    async def action_interrupt(self) -> None:
        """Copy what is selected, else stop the reply under way, else clear the box, else quit."""
        selected = self.composer.selected_text or self.screen.get_selected_text()
        if selected:
            self.copy_to_clipboard(selected)
            self.screen.clear_selection()
            self.composer.move_cursor(self.composer.cursor_location)
            self.status.flash("copied")
        elif self.reply is not None and not self.reply.cancelled:
            self.reply.cancel()
        elif self.composer.text:
            self.composer.put_aside()
            self.status.flash("Up recalls it · Ctrl+C again quits")
        else:
            await self.action_quit()

    async def action_quit(self) -> None:
        self.leave(None)

    def leave(self, result: BaseException | None) -> None:
        """Stop everything and end the app. The threads are waited for in `close`."""
        self._leaving = True
        if self.reply is not None:
            self.reply.leave()
        self.exit(result)

    def action_regenerate(self) -> None:
        self._when_idle(self._regenerate)

    def _regenerate(self) -> None:
        if self.chat is None:
            self.status.flash("still loading")
            return
        roles = [m["role"] for m in self.chat.messages]
        if "user" not in roles[-2:]:
            self.status.flash("there is nothing to answer again")
            return
        self._replaced = self.transcript.query(AssistantMessage).last() if roles[-1] == "assistant" else None
        if self._replaced is not None:
            self._replaced.display = False
        self.call_next(self._start, None, **changes_to_regenerate(self._params))

    def action_new(self) -> None:
        self._when_idle(self._new)

    def _new(self) -> None:
        if self.chat is None:
            self.status.flash("still loading")
            return
        self.file = ChatFile.new(self.file.path.parent, self.file.bundle)
        self.chat.clear()
        self._resumed = []
        self.status.set(used_tokens=0, tokens_per_s=0.0, ttft_ms=0.0)
        self.call_next(self._show_new)

    async def _show_new(self) -> None:
        await self.transcript.show([])
        await self.transcript.add(Note(KEYS, classes="welcome"))

    def _when_idle(self, action: Callable[[], None]) -> None:
        """Now, or when the reply under way has stopped, which it is told to."""
        if self.reply is None:
            action()
        else:
            self._next = action
            self.reply.cancel()

    def action_scroll(self, where: str) -> None:
        getattr(self.transcript, f"scroll_{where}")(animate=False)

    # ---- leaving ----

    def _catch_signals(self) -> None:
        """A polite kill, or a closed terminal, ends the app in order. What has come is saved before anything else."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            try:
                loop.add_signal_handler(number, self._killed)
            except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
                return

    def _killed(self) -> None:
        self.file.save(self._messages())
        self.leave(KeyboardInterrupt())

    def close(self) -> str | None:
        """Wait for the threads and save; call it when the app has ended. Returns what to say of saving, if anything."""
        if self.reply is not None:
            self.reply.leave()  # after a crash nobody has
        join_all([self.reply, self._loader], LEAVE_SECONDS)
        problem = self.file.save(self._messages())
        if self._loader.model is not None:
            self._loader.model.close()
        return problem or self.file.news()

    def _messages(self) -> list[dict[str, str]]:
        """The conversation, with a question that has no answer yet."""
        if self.reply is not None:
            return self.reply.messages()
        if self.chat is not None:
            return self.chat.messages
        if self._asked is None:
            return self._resumed
        begun = self._resumed or ([{"role": "system", "content": self._system}] if self._system is not None else [])
        return [*begun, {"role": "user", "content": self._asked.text}]  # while loading

    def _print_error_renderables(self) -> None:
        """After a crash Textual prints a page of traceback here; ours is one line, made of what `run` raises."""
        self._exit_renderables.clear()


def _ending(result: Result) -> str:
    if result.finish_reason == "cancelled":
        return "stopped"
    if result.finish_reason == "length":
        return f"cut off after {result.usage.completion_tokens:,} tokens; --max-tokens allows more"
    return ""


def run(
    bundle: Path,
    *,
    system: str | None,
    params: SamplingParams,
    loading: Mapping[str, Any],
    saved: SavedChat | None,
    answer: colours.Answer,
) -> None:
    """Chat until the user leaves; `loading` are settings of gptedge.load. Raises what ended it, if not the user."""

    def load() -> Model:
        from gptedge import load as load_model

        return load_model(bundle, **loading, long_prompts=saved is not None)

    file = ChatFile(saved.path, bundle, saved.messages) if saved else ChatFile.new(chats_folder(), bundle)
    app = ChatApp(
        load,
        name=bundle.resolve().name,
        file=file,
        system=system,
        params=params,
        resumed=saved.messages if saved else (),
        answer=answer,
    )
    ended_by = app.run() or app._exception
    problem = app.close()
    if problem:
        print(f"gptedge: {problem}", file=sys.stderr)
    if ended_by is not None:
        raise ended_by
    if app.file.exists:
        print("This conversation is saved; gptedge chat --resume goes on with it.", file=sys.stderr)
