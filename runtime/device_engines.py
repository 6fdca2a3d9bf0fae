"""A bundle's components at work on a GPU: one stream, buffers that stay, and nothing on the host but what is asked for.

All work goes into one stream, so that components can share the memory for their activations, and so that requests of
several threads take turns step by step. A lock is held while something is enqueued, never while the GPU is waited for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..errors import BackendError, DeviceMemoryError, InputError
from .cuda import Device, Stream
from .device_array import DeviceArray
from .device_kernel import StepKernel
from .device_loop import DeviceLoop
from .device_steps import DeviceStep, Recording
from .device_workspace import Workspace
from .loop import check_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from numpy.typing import NDArray

    from ..engines.manifest import Manifest
    from .loop import Step
    from .request import Request
    from .session import DeviceBinding, DeviceSession, Passage

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]

_F4 = 4
# Of each kind, what is kept for the next request of the same shape: more would hold memory that others need.
_IDLE_LOOPS = 2
_IDLE_BINDINGS = 4


class DeviceEngines:
    """`.session.Engines` on a GPU.

    Parameters
    ----------
    manifest
        Of the bundle.
    device
        The GPU, which this then owns.
    open_session
        Loads a component by its name, for a stream and with memory that all share; called when it is first needed.

    """

    tiles = False

    def __init__(
        self, manifest: Manifest, device: Device, open_session: Callable[[str, Stream, Workspace], DeviceSession]
    ) -> None:
        self._manifest = manifest
        self._open_session = open_session
        self._lock = threading.RLock()
        self._sessions: dict[str, DeviceSession] = {}
        self._unsaved: set[str] = set()
        self._closed = False
        self._busy: list[DeviceLoop] = []
        self._loops: deque[tuple[tuple[int, ...], DeviceLoop]] = deque()
        self._bindings: OrderedDict[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], DeviceBinding] = OrderedDict()
        self.graph_obstacle: str | None = None
        with ExitStack() as stack:
            self.device = stack.enter_context(device)
            with device.current():
                self.stream = stack.enter_context(Stream(device))
                self._kernel = StepKernel(device)
                stack.callback(self._kernel.close)
            self._workspace = Workspace(device, self.stream)
            self._stack = stack.pop_all()

    def encode(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """Return the text embeddings, float32 of shape (rows of all passages, 77, width)."""
        text = self._manifest.text
        rows = sum(len(passage.rows) for passage in passages)
        with self._on_gpu():
            result = DeviceArray(self.device, (rows, text.max_tokens, text.embedding_width))
            self._encode(passages, result.pointer)
            result.written_by(self.stream)
        return result.numpy()

    def denoise(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> Generator[Step, NDArray[np.float32] | None]:
        """Run the denoising loop; see `.loop.denoise`. Steps are enqueued as they are asked for, and not waited for."""
        table, total = request.table, len(request.table)
        with self._loop(request) as loop:
            with self._on_gpu():
                recording = self._retrying(lambda: Recording(self.device, total, loop.shape))
                self._begin(loop, request, passages, draw_noise, recording=recording)
            for index, timestep in enumerate(table.timesteps.tolist()):
                with self._on_gpu():
                    recording.mark_begin(self.stream, index)
                    loop.step()
                    recording.mark_end(self.stream, index)
                step = DeviceStep(index, total, timestep, recording, partial(loop.estimate, table, index))
                try:
                    replacement = yield step
                finally:
                    step.expire()
                if replacement is not None:
                    with self._on_gpu():
                        loop.replace(check_shape("the replacement", replacement, loop.shape))

    def latents(
        self, request: Request, passages: Sequence[Passage], draw_noise: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Run the whole loop, waiting for nothing before its end, and return the last latents."""
        return self.generate(request, passages, draw_noise, images=False).numpy()

    def generate(
        self,
        request: Request,
        passages: Sequence[Passage],
        draw_noise: Callable[[], NDArray[np.float32]],
        *,
        images: bool,
        streams: Sequence[int] = (),
        initial: int | None = None,
    ) -> DeviceArray:
        """Enqueue a whole request and return its result to be; the arguments are those of `enqueue`."""
        with self._on_gpu():
            shape = result_shape(request, images=images)
            result = self._retrying(lambda: DeviceArray(self.device, shape, purpose="the result"))
            arguments = request, passages, draw_noise, result.pointer
            self.enqueue(*arguments, images=images, streams=streams, initial=initial)
            return result.written_by(self.stream)

    def enqueue(
        self,
        request: Request,
        passages: Sequence[Passage],
        draw_noise: Callable[[], NDArray[np.float32]],
        target: int,
        *,
        images: bool,
        streams: Sequence[int] = (),
        initial: int | None = None,
    ) -> None:
        """Enqueue a whole request, and wait for nothing.

        Parameters
        ----------
        request, passages, draw_noise
            As for `denoise`.
        target
            Where the result shall be: an address in the GPU's memory, a multiple of 256.
        images
            Whether the result is the images, as `decode` gives them, or the latents.
        streams
            Of others: what they hold comes before the request, and what they will be given after.
        initial
            Address of a unit gaussian in the GPU's memory, to start from instead of the request's.

        """
        with self._loop(request) as loop, self._on_gpu(), self.stream.joined(streams):
            self._begin(loop, request, passages, draw_noise, initial=initial)
            for _ in range(len(request.table)):
                loop.step()
            if images:
                # Where the loop keeps them: whoever uses it next comes later in the stream.
                self._decode(loop.result, loop.shape, target)
            else:
                self.stream.copy(target, loop.result, loop.latents_bytes)

    def decode(self, latents: NDArray[np.float32], *, vae_tiling: bool | None = None) -> NDArray[np.float32]:  # noqa: ARG002
        """Return the images, float32 of shape (N, 3, height, width), around [-1, 1]."""
        flat = np.ascontiguousarray(latents, np.float32)
        count, _, height, width = latents.shape
        with self._on_gpu():
            source = DeviceArray(self.device, latents.shape)
            images = DeviceArray(self.device, (count, 3, 8 * height, 8 * width), purpose="the images")
            self.stream.copy_in(source.pointer, flat.ctypes.data, flat.nbytes)
            self._decode(source.pointer, latents.shape, images.pointer)
            images.written_by(self.stream)
        return images.numpy()

    @contextmanager
    def _on_gpu(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise InputError("this pipeline is closed: load the bundle again")
            with self.device.current():
                yield

    def _session(self, name: str) -> DeviceSession:
        if name not in self._sessions:
            self._sessions[name] = self._open_session(name, self.stream, self._workspace)
        return self._sessions[name]

    def _bind(self, name: str, shapes: Shapes) -> DeviceBinding:
        binding = self._session(name).bind(shapes)
        self._unsaved.add(name)
        return binding

    def _binding(self, name: str, shapes: Shapes) -> DeviceBinding:
        """Give a binding that serves whoever has the lock: what it is given and what it gives is enqueued at once."""
        key = name, tuple(shapes.items())
        if key not in self._bindings:
            self._bindings[key] = self._retrying(lambda: self._bind(name, shapes))
            if len(self._bindings) > _IDLE_BINDINGS:
                self.stream.synchronize()
                self._bindings.popitem(last=False)[1].close()
        self._bindings.move_to_end(key)
        return self._bindings[key]

    def _encode(self, passages: Sequence[Passage], target: int) -> None:
        """Enqueue the text encoder, and the copies of what it gives to each row."""
        text = self._manifest.text
        row_bytes = _F4 * text.max_tokens * text.embedding_width
        for passage in passages:
            shape = passage.ids.shape
            binding = self._binding(
                "text_encoder",
                {"input_ids": shape, "clip_skip": (1,), "text_embeddings": (*shape, text.embedding_width)},
            )
            binding.write("input_ids", passage.ids)
            binding.write("clip_skip", np.array([passage.clip_skip], np.int64))
            binding.prepare()
            binding.enqueue()
            for source in passage.rows:
                self.stream.copy(target, binding.addresses["text_embeddings"] + source * row_bytes, row_bytes)
                target += row_bytes

    def _decode(self, source: int, shape: tuple[int, ...], target: int) -> None:
        """Enqueue the decoder, which writes to the target: one image after the other, as it needs most memory."""
        count, channels, height, width = shape
        image = (1, 3, 8 * height, 8 * width)
        binding = self._binding("vae_decoder", {"latents": (1, channels, height, width), "image": image})
        latent_bytes, image_bytes = (_F4 * int(np.prod(part)) for part in (shape[1:], image))
        try:
            for index in range(count):
                self.stream.copy(binding.addresses["latents"], source + index * latent_bytes, latent_bytes)
                binding.place("image", target + index * image_bytes)
                binding.prepare()
                binding.enqueue()
        finally:
            binding.place("image", 0)

    def _begin(
        self,
        loop: DeviceLoop,
        request: Request,
        passages: Sequence[Passage],
        draw_noise: Callable[[], NDArray[np.float32]],
        *,
        initial: int | None = None,
        recording: Recording | None = None,
    ) -> None:
        if initial is None:
            first = draw_noise() if request.latents is None else request.latents
        self._encode(passages, loop.binding.addresses["text_embeddings"])
        loop.begin(request.table, request.guidance_scale, first if initial is None else initial, draw_noise, recording)

    @contextmanager
    def _loop(self, request: Request) -> Iterator[DeviceLoop]:
        """Give a loop to a request; it is kept for the next one of the same shape, unless it failed."""
        if not request.exact:
            raise BackendError(
                "guidance, cache and encoder interval are for the CPU alone so far: leave them out, or run an ONNX "
                "bundle with CUDA_VISIBLE_DEVICES= to hide the GPU"
            )
        shape = (len(request.seeds), *request.latent_shape)
        key = (*shape, int(request.guided))
        with self._on_gpu():
            loop = self._idle(key) or self._retrying(lambda: self._new_loop(request, shape))
            self._busy.append(loop)
        failed = True
        try:
            yield loop
            failed = False
        except BackendError:
            raise
        except BaseException:
            failed = False  # the caller's affair, such as Ctrl-C: the loop is as good as it was
            raise
        finally:
            self._put_back(key, loop, failed=failed)

    def _put_back(self, key: tuple[int, ...], loop: DeviceLoop, *, failed: bool) -> None:
        with self._lock:
            if self._closed:
                return
            self._busy.remove(loop)
            with self.device.current():
                if failed:
                    with suppress(BackendError):  # the first failure is the one to tell
                        self.stream.synchronize()
                    with suppress(BackendError):
                        loop.close()
                    return
                self.graph_obstacle = loop.graph_obstacle
                self._loops.append((key, loop))
                if len(self._loops) > _IDLE_LOOPS:
                    self.stream.synchronize()
                    self._loops.popleft()[1].close()
                while self._unsaved:
                    self._sessions[self._unsaved.pop()].keep()

    def _idle(self, key: tuple[int, ...]) -> DeviceLoop | None:
        for entry in self._loops:
            if entry[0] == key:
                self._loops.remove(entry)
                return entry[1]
        return None

    def _new_loop(self, request: Request, shape: tuple[int, ...]) -> DeviceLoop:
        text = self._manifest.text
        rows = shape[0] * (2 if request.guided else 1)
        batch = (rows, *shape[1:])
        embeddings = (rows, text.max_tokens, text.embedding_width)
        shapes = {"latents": batch, "timestep": (1,), "text_embeddings": embeddings, "prediction": batch}
        return DeviceLoop(
            self.device,
            self.stream,
            self._kernel,
            lambda: self._bind("unet", shapes),
            shape,
            guided=request.guided,
        )

    def _retrying(self, make: Callable[[], T]) -> T:
        """Make something; where memory lacks, once more without what is kept for later requests."""
        try:
            return make()
        except DeviceMemoryError:
            if not self._loops and not self._bindings:
                raise
            self._drop_idle()
            return make()

    def _drop_idle(self) -> None:
        with ExitStack() as stack:
            for _, loop in self._loops:
                stack.callback(loop.close)
            for binding in self._bindings.values():
                stack.callback(binding.close)
            self._loops.clear()
            self._bindings.clear()
            stack.callback(self.stream.synchronize)

    def close(self) -> None:
        """Free everything. Nothing may be running."""
        with self._lock, ExitStack() as stack:
            if self._closed:
                return
            self._closed = True
            stack.callback(self._stack.close)
            stack.enter_context(self.device.current())
            stack.callback(self._workspace.close)
            for session in self._sessions.values():
                stack.callback(session.close)
            for loop in self._busy:  # of generators that nobody finished
                stack.callback(loop.close)
            stack.callback(self._drop_idle)


def result_shape(request: Request, *, images: bool) -> tuple[int, ...]:
    """Give the shape of a request's images, (N, 3, height, width), or of its latents."""
    count = len(request.seeds)
    return (count, 3, request.height, request.width) if images else (count, *request.latent_shape)
