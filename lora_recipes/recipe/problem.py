"""What can be wrong with a recipe: one `Problem` a finding, all findings of a recipe in one `InvalidRecipe`."""

from dataclasses import dataclass

from lora_recipes.errors import EXIT_USER, RecipeError
from lora_recipes.redact import redacted


@dataclass(frozen=True)
class Origin:
    """Where a value was written. Line and column count from 1; both are 0 where there is no line (a whole file)."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One finding: where, which key, what is wrong (`message`), what to do (`hint`), and the exit code it leads to."""

    origin: Origin
    key: str
    message: str
    hint: str = ""
    exit_code: int = EXIT_USER

    def __str__(self) -> str:
        where = f"{self.origin}:{self.origin.column}" if self.origin.column else str(self.origin)
        key = f"`{self.key}` " if self.key else ""
        return redacted(f"{where}: {key}{self.message}" + (f"; {self.hint}" if self.hint else ""))

    def as_json(self) -> dict[str, object]:
        return {
            "file": redacted(self.origin.file),
            "line": self.origin.line,
            "column": self.origin.column,
            "key": redacted(self.key),
            "message": redacted(self.message),
            "hint": redacted(self.hint),
        }


class InvalidRecipe(RecipeError):
    """A recipe with problems. The text lists one a line; the exit code is the gravest one's."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
        self.exit_code = max(problem.exit_code for problem in problems)
