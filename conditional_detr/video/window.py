"""Show frames in a window, by Python's own tkinter."""

from typing import Any

from PIL import Image


class Window:
    """A window that shows one image after the other; Escape, q or its button closes it.

    Use it in the main thread only, and call :meth:`close` in the end.

    Args:
        title: its title.

    Attributes:
        closed: whether the user has closed it.

    Raises:
        ImportError: this Python has no tkinter.
        OSError: there is no screen.
    """

    def __init__(self, title: str) -> None:
        try:
            import tkinter

            from PIL import ImageTk
        except ImportError as error:
            raise ImportError("a window needs tkinter, which this Python lacks; on Debian: python3-tk") from error
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise OSError(f"expected a screen for a window, got none: {error}") from error
        self._to_tk: Any = ImageTk.PhotoImage
        self._shown: Any = None  # tkinter does not keep it
        self.closed = False
        self._root.title(title)
        self._root.protocol("WM_DELETE_WINDOW", self._close)
        for key in ("<Escape>", "q"):
            self._root.bind(key, self._close)
        self._label = tkinter.Label(self._root)
        self._label.pack()

    def show(self, image: Image.Image) -> None:
        """Show an image, reduced to the screen."""
        limit = (self._root.winfo_screenwidth(), self._root.winfo_screenheight())
        if image.width > limit[0] or image.height > limit[1]:
            image = image.copy()
            image.thumbnail(limit)
        self._shown = self._to_tk(image)
        self._label.configure(image=self._shown)
        self._root.update()

    def close(self) -> None:
        """Remove the window."""
        self._root.destroy()

    def _close(self, *_: object) -> None:
        self.closed = True
