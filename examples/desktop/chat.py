"""A chat window: what a desktop program needs of gptedge, in one file and with nothing else but Python.

    pip install "gptedge[cpu]"
    python chat.py BUNDLE
    pyinstaller --windowed chat.py      # a folder that runs where there is no Python

Only the window's own thread touches the window. The model is loaded and asked in others; what they have to say waits in
a queue, which the window empties 30 times a second. Closing it in the middle of a reply is no trouble.
"""

from __future__ import annotations

import queue
import sys
import threading
import tkinter as tk
from collections.abc import Callable
from tkinter import scrolledtext

import gptedge

Event = tuple[str, str]
"""What happened, and its text: ready, or broken; says, and then done (with why it ended), or failed."""


class Assistant:
    """A model and one chat, used from threads of its own."""

    def __init__(self, bundle: str, events: queue.Queue[Event]) -> None:
        self._bundle, self._events = bundle, events
        self._model: gptedge.Model | None = None
        self._chat: gptedge.Chat | None = None
        self._stream: gptedge.Stream | None = None
        self._start(self._load, failure="broken")

    def ask(self, question: str) -> None:
        """Returns at once; the reply comes as events."""
        self._start(lambda: self._answer(question))

    def stop(self) -> None:
        """End the reply under way with what has come so far."""
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        self.stop()
        if self._model is not None:
            self._model.close()

    def _start(self, work: Callable[[], None], failure: str = "failed") -> None:
        def run() -> None:
            try:
                work()
            except gptedge.GptEdgeError as e:
                self._events.put((failure, str(e)))

        threading.Thread(target=run, daemon=True).start()

    def _load(self) -> None:
        self._model = gptedge.load(self._bundle)
        self._chat = self._model.chat(context_overflow="shift")
        self._events.put(("ready", self._model.bundle.path.name))

    def _answer(self, question: str) -> None:
        assert self._chat is not None, "ask once it is ready"
        with self._chat.stream(question) as self._stream:
            for chunk in self._stream:
                self._events.put(("says", chunk.text))
        self._events.put(("done", self._stream.result.finish_reason))


class Window:
    def __init__(self, bundle: str) -> None:
        self.root = tk.Tk()
        self.root.title("gptedge")
        self.transcript = scrolledtext.ScrolledText(self.root, wrap="word", state="disabled", width=72, height=24)
        self.transcript.tag_configure("you", font=("TkDefaultFont", 10, "bold"))
        self.transcript.tag_configure("note", foreground="gray45")
        self.question = tk.Entry(self.root, state="disabled")
        self.button = tk.Button(self.root, text="Ask", command=self.ask, state="disabled")
        self.transcript.grid(row=0, column=0, columnspan=2, sticky="nsew", padx=8, pady=8)
        self.question.grid(row=1, column=0, sticky="ew", padx=8, pady=(0, 8))
        self.button.grid(row=1, column=1, padx=(0, 8), pady=(0, 8))
        self.root.rowconfigure(0, weight=1)
        self.root.columnconfigure(0, weight=1)
        self.question.bind("<Return>", lambda _: self.ask())
        self.root.bind("<Escape>", lambda _: self.assistant.stop())
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self.events: queue.Queue[Event] = queue.Queue()
        self.write(f"Loading {bundle} …\n", "note")
        self.assistant = Assistant(bundle, self.events)
        self.root.after(33, self._empty_queue)

    def ask(self) -> None:
        text = self.question.get().strip()
        if not text or str(self.question["state"]) == "disabled":
            return
        self.question.delete(0, "end")
        self.write(f"\n{text}\n", "you")
        self._answering(True)
        self.assistant.ask(text)

    def write(self, text: str, *tags: str) -> None:
        self.transcript.configure(state="normal")
        self.transcript.insert("end", text, tags)
        self.transcript.configure(state="disabled")
        self.transcript.see("end")

    def close(self) -> None:
        self.assistant.close()
        self.root.destroy()

    def _answering(self, is_answering: bool) -> None:
        """Either a question can be asked, or a reply be stopped."""
        self.question.configure(state="disabled" if is_answering else "normal")
        stop, ask = ("Stop", self.assistant.stop), ("Ask", self.ask)
        text, command = stop if is_answering else ask
        self.button.configure(text=text, command=command, state="normal")

    def _empty_queue(self) -> None:
        while not self.events.empty():
            kind, text = self.events.get()
            if kind == "says":
                self.write(text)
                continue
            notes = {"ready": f"{text} is ready.\n", "done": "\n" if text == "stop" else " …\n"}
            self.write(notes.get(kind, f"\n{text}\n"), "note")
            if kind != "broken":
                self._answering(False)
                self.question.focus_set()
        self.root.after(33, self._empty_queue)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python chat.py BUNDLE")
    Window(sys.argv[1]).root.mainloop()
