"""The driver keeps every promise of the contract. It runs as it is installed: python -m pytest tests"""

import pytest
from sami_acme.device import Appliance
from sami_acme.driver import AcmeDriver
from sami_acme.kinds import BANS

from sami_plugin.model.flows import ZoneRole
from sami_plugin.model.scope import Scope
from sami_plugin.testing.conformance import NEIGHBOUR_ADDRESSES, PORT_ADDRESSES, FlowDriverConformance, flows


class TestAcme(FlowDriverConformance):
    def some_flows(self, template, count, first=0):
        made = flows(template, count, first=first)
        if template in BANS:
            made.rows["acmeReason"], made.rows["acmeScore"] = 7, 90
        return made

    @pytest.fixture(autouse=True)
    def appliance(self):
        self.device = Appliance()
        yield
        self.device.close()

    def make_driver(self):
        return AcmeDriver(self.device.url)

    def make_scope(self):
        return Scope("port", "guest", {ZoneRole.PORT: 7}, PORT_ADDRESSES)

    def make_other_scope(self):
        return Scope("other", "another", {ZoneRole.PORT: 8}, PORT_ADDRESSES)

    def make_shared_scope(self):
        zones = {ZoneRole.PORT: 9}
        return Scope("port", "guest", zones, PORT_ADDRESSES, is_shared=True, neighbours=NEIGHBOUR_ADDRESSES)

    @pytest.mark.parametrize(("capacity", "declared"), [(None, 10000), (500, 500), (20000, 10000)])
    def test_operator_s_capacity_counts_where_it_is_less(self, capacity, declared):
        assert AcmeDriver(self.device.url, capacity=capacity).capabilities().capacity == declared
