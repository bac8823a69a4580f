"""The way back along a chain of operators, one understood step after another."""

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature_engine.chain import EdgeKey, Link, Links, Socket, anchor, edge_key, unsupported_chain
from curvature_engine.differentiation import gradients
from curvature_engine.jacobians import Form, form_of
from curvature_engine.precision import accumulation_dtype


@dataclass(frozen=True)
class Step:
    """One link of the chain, understood.

    Attributes:
        link: the operator; of several elementwise ones together the last.
    """

    link: Link
    source: Socket
    form: Form

    @property
    def target(self) -> Socket:
        """The operator's output."""
        return self.link.output

    def is_node(self, names: frozenset[str], place: int = 0) -> bool:
        """Whether the operator is a single node of the graph, of one of these names, that takes the source at a place.

        Then its Jacobian is this node's, and no edit in place can have come between.
        """
        node = self.target.edge.node
        return node.name() in names and node.next_functions[place : place + 1] == (self.source.key,)

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """From a cotangent of the operator's output to one of its input, both flat.

        Raises:
            EngineError: `unsupported_model` where no gradient goes that way.
        """
        given = cotangent.to(self.target.dtype).reshape(self.target.graph_shape)
        (found,) = gradients(self.target.edge, [self.source.edge], given)
        if found is None:
            raise unsupported_chain(f"{self.link.title} edits a tensor in place through a view of another")
        return found.reshape(-1).to(accumulation_dtype(found.dtype))


def trace_chain(outputs: Tensor, links: Links, wanted: frozenset[EdgeKey]) -> list[Step]:
    """The operators from the outputs back to the layers wanted, by the edges of their outputs.

    Raises:
        EngineError: `unsupported_model` where there is no chain, with the operator at fault.
    """
    steps: list[Step] = []
    key, missing = _key_of(outputs), set(wanted)
    missing.discard(key)
    while missing:
        step = _step(links, links.maker(key))
        steps.append(step)
        key = step.source.key
        missing.discard(key)
    return steps


def _step(links: Links, link: Link) -> Step:
    """The step back over one operator, or over elementwise ones whose branches come from one tensor."""
    sources = link.entry.inputs
    if not sources:
        raise unsupported_chain(f"it ends at {link.title}, and some layers stand beside it")
    if len(sources) > 1:
        return Step(link, _common_source(links, link), Form("diagonal", len(link.output.shape)))
    form = form_of(link, sources[0])
    if form is None:
        raise unsupported_chain(f"it does not know the Jacobian of {link.title}, {shapes_of(link)}")
    return Step(link, sources[0], form)


def _common_source(links: Links, link: Link) -> Socket:
    """The one tensor from which elementwise operators alone make what a link joins (`x * sigmoid(x)`).

    Raises:
        EngineError: `unsupported_model` where there is none.
    """
    joined = unsupported_chain(f"{link.title} joins {len(link.entry.inputs)} branches")
    open_ends = {source.key: source for source in link.entry.inputs}
    if any(_is_not_elementwise(link, source) for source in link.entry.inputs):
        raise joined
    while len(open_ends) > 1:
        makers = [links.maker(key) for key in open_ends if links.has_maker(key)]
        if not makers:
            raise joined
        latest = max(makers, key=lambda maker: maker.number)  # nothing that comes after it is open any more
        if not latest.entry.inputs or any(_is_not_elementwise(latest, source) for source in latest.entry.inputs):
            raise joined
        del open_ends[latest.output.key]
        open_ends.update({source.key: source for source in latest.entry.inputs})
    (source,) = open_ends.values()
    return source


def _is_not_elementwise(link: Link, source: Socket) -> bool:
    form = form_of(link, source)
    return form is None or form.kind != "diagonal"


def _key_of(outputs: Tensor) -> EdgeKey:
    return edge_key(output_edge(outputs))


def output_edge(outputs: Tensor) -> GradientEdge:
    """Where the gradient of the outputs arrives."""
    return get_gradient_edge(anchor(outputs))


def shapes_of(link: Link) -> str:
    """From which shape to which, for messages."""
    return f"from {list(link.entry.inputs[0].shape)} to {list(link.output.shape)}"
