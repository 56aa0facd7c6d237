"""Run in a peer's environment: gptedge's commands, from the sources of the environment that asks.

In: {"tree", "packages", "commands"} as JSON. Out, on the last line: for each command its exit code, stdout and stderr.
The peer's own packages come first, then those of the asking environment, for what the peer lacks.
"""

import contextlib
import io
import json
import sys

work = json.load(sys.stdin)
sys.path.insert(0, work["tree"])
sys.path.append(work["packages"])

from gptedge.cli import main  # noqa: E402

answers = []
for command in work["commands"]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
