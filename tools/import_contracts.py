"""A contract type for import-linter, beside those that it brings."""

from grimp import ImportGraph
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.domain.contract import ContractCheck


class ForbiddenWherePresent(ForbiddenContract):
    """Forbids imports as import-linter's own type does, and lets a contract name modules that are still to come.

    import-linter's type fails when a named module does not exist. Here such a module counts for nothing until it
    exists, and the contract holds for it from then on.
    """

    type_name = "forbidden_where_present"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Check the modules of the contract that exist."""
        package = next(iter(self.session_options["root_packages"]))

        def is_there(module: str) -> bool:
            return module in graph.modules or not module.startswith(f"{package}.")

        self.source_modules = {m for m in self.source_modules if is_there(m.expression)}
        self.forbidden_modules = {m for m in self.forbidden_modules if is_there(m.expression)}
        return super().check(graph, verbose)
