"""What `ovs-ofctl --no-names --no-stats dump-flows br-int` writes on the hosts that are meant.

The flows of Neutron are those that its OVSFirewallDriver (29.0.0) programmed for three ports of one network: the first
with allowed address pairs, the third without port security. The flows of OVN are those of 23.03.1 for a port with
port security and allowed address pairs, which has a distributed floating IP.
"""

TRANSIENT = """\
 table=60, priority=100,in_port=1 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,71)
 table=60, priority=100,in_port=2 actions=load:0x2->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,71)
 table=60, priority=100,in_port=3 actions=load:0x3->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,73)
 table=60, priority=90,dl_vlan=3,dl_dst=00:00:5e:00:01:01 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],strip_vlan,resubmit(,81)
 table=60, priority=90,dl_vlan=3,dl_dst=fa:16:3e:00:00:07 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],strip_vlan,resubmit(,81)
 table=60, priority=90,dl_vlan=3,dl_dst=fa:16:3e:00:00:08 actions=load:0x2->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],strip_vlan,resubmit(,81)
"""  # noqa: E501

BASE_EGRESS = """\
 table=71, priority=110,ct_state=+trk actions=ct_clear,resubmit(,71)
 table=71, priority=95,arp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,arp_spa=192.0.2.7 actions=resubmit(,94)
 table=71, priority=65,ip,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=95,arp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,arp_spa=192.0.2.100 actions=resubmit(,94)
 table=71, priority=65,ip,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.100 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=95,arp,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08,arp_spa=192.0.2.8 actions=resubmit(,94)
 table=71, priority=65,ip,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08,nw_src=192.0.2.8 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=95,rarp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07 actions=resubmit(,94)
 table=71, priority=95,rarp,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08 actions=resubmit(,94)
 table=71, priority=95,arp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,arp_spa=203.0.113.0/24 actions=resubmit(,94)
 table=71, priority=65,ip,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=203.0.113.0/24 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=95,icmp6,reg5=0x1,in_port=1,icmp_type=136,nd_target=2001:db8::100 actions=resubmit(,94)
 table=71, priority=95,icmp6,reg5=0x1,in_port=1,icmp_type=136,nd_target=2001:db8::7 actions=resubmit(,94)
 table=71, priority=95,icmp6,reg5=0x1,in_port=1,icmp_type=136,nd_target=fe80::f816:3eff:fe00:7 actions=resubmit(,94)
 table=71, priority=95,icmp6,reg5=0x2,in_port=2,icmp_type=136,nd_target=fe80::f816:3eff:fe00:8 actions=resubmit(,94)
 table=71, priority=80,udp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.7,tp_src=68,tp_dst=67 actions=resubmit(,73)
 table=71, priority=80,udp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.100,tp_src=68,tp_dst=67 actions=resubmit(,73)
 table=71, priority=80,udp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=0.0.0.0,tp_src=68,tp_dst=67 actions=resubmit(,73)
 table=71, priority=80,udp,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08,nw_src=192.0.2.8,tp_src=68,tp_dst=67 actions=resubmit(,73)
 table=71, priority=80,udp,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08,nw_src=0.0.0.0,tp_src=68,tp_dst=67 actions=resubmit(,73)
 table=71, priority=80,udp,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,nw_src=203.0.113.0/24,tp_src=68,tp_dst=67 actions=resubmit(,73)
 table=71, priority=80,udp6,reg5=0x1,in_port=1,dl_src=00:00:5e:00:01:01,ipv6_src=2001:db8::100,tp_src=546,tp_dst=547 actions=resubmit(,73)
 table=71, priority=80,udp6,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,ipv6_src=2001:db8::7,tp_src=546,tp_dst=547 actions=resubmit(,73)
 table=71, priority=80,udp6,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,ipv6_src=fe80::f816:3eff:fe00:7,tp_src=546,tp_dst=547 actions=resubmit(,73)
 table=71, priority=80,udp6,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08,ipv6_src=fe80::f816:3eff:fe00:8,tp_src=546,tp_dst=547 actions=resubmit(,73)
 table=71, priority=70,udp,reg5=0x1,in_port=1,tp_src=67,tp_dst=68 actions=resubmit(,93)
 table=71, priority=70,udp6,reg5=0x1,in_port=1,tp_src=547,tp_dst=546 actions=resubmit(,93)
 table=71, priority=70,udp,reg5=0x2,in_port=2,tp_src=67,tp_dst=68 actions=resubmit(,93)
 table=71, priority=70,udp6,reg5=0x2,in_port=2,tp_src=547,tp_dst=546 actions=resubmit(,93)
 table=71, priority=70,icmp6,reg5=0x1,in_port=1,icmp_type=134 actions=resubmit(,93)
 table=71, priority=70,icmp6,reg5=0x2,in_port=2,icmp_type=134 actions=resubmit(,93)
 table=71, priority=65,ipv6,reg5=0x1,in_port=1,dl_src=00:00:5e:00:01:01,ipv6_src=2001:db8::100 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=65,ipv6,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,ipv6_src=2001:db8::7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=65,ipv6,reg5=0x1,in_port=1,dl_src=fa:16:3e:00:00:07,ipv6_src=fe80::f816:3eff:fe00:7 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=65,ipv6,reg5=0x2,in_port=2,dl_src=fa:16:3e:00:00:08,ipv6_src=fe80::f816:3eff:fe00:8 actions=ct(table=72,zone=NXM_NX_REG6[0..15])
 table=71, priority=10,reg5=0x1,in_port=1 actions=ct_clear,resubmit(,93)
 table=71, priority=10,reg5=0x2,in_port=2 actions=ct_clear,resubmit(,93)
 table=71, priority=0 actions=drop
"""  # noqa: E501

TRANSIENT_14 = """\
 table=60, reset_counts priority=100,in_port=1 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,71)
 table=60, reset_counts priority=100,in_port=2 actions=load:0x2->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,71)
 table=60, reset_counts priority=100,in_port=3 actions=load:0x3->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],resubmit(,73)
 table=60, reset_counts priority=90,dl_vlan=3,dl_dst=00:00:5e:00:01:01 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],pop_vlan,resubmit(,81)
 table=60, reset_counts priority=90,dl_vlan=3,dl_dst=fa:16:3e:00:00:07 actions=load:0x1->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],pop_vlan,resubmit(,81)
 table=60, reset_counts priority=90,dl_vlan=3,dl_dst=fa:16:3e:00:00:08 actions=load:0x2->NXM_NX_REG5[],load:0x3->NXM_NX_REG6[],pop_vlan,resubmit(,81)
"""  # noqa: E501

OVN_PHYSICAL = """\
 priority=100,in_port=1 actions=load:0x8->NXM_NX_REG13[],load:0x2->NXM_NX_REG11[],load:0x7->NXM_NX_REG12[],load:0x1->OXM_OF_METADATA[],load:0x1->NXM_NX_REG14[],resubmit(,8)
 priority=0 actions=drop
"""  # noqa: E501

OVN_PORT_SECURITY = """\
 table=73, priority=95,arp,reg14=0x1,metadata=0x1 actions=resubmit(,74)
 table=73, priority=90,ipv6,reg14=0x1,metadata=0x1,dl_src=00:00:5e:00:01:01,ipv6_src=2001:db8::100 actions=resubmit(,74)
 table=73, priority=90,ipv6,reg14=0x1,metadata=0x1,dl_src=00:00:5e:00:01:01,ipv6_src=fe80::200:5eff:fe00:101 actions=resubmit(,74)
 table=73, priority=90,ipv6,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,ipv6_src=2001:db8::7 actions=resubmit(,74)
 table=73, priority=90,ipv6,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,ipv6_src=fe80::f816:3eff:fe00:7 actions=resubmit(,74)
 table=73, priority=90,icmp6,reg14=0x1,metadata=0x1,dl_src=00:00:5e:00:01:01,ipv6_src=::,ipv6_dst=ff02::/16,icmp_type=131,icmp_code=0 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,icmp6,reg14=0x1,metadata=0x1,dl_src=00:00:5e:00:01:01,ipv6_src=::,ipv6_dst=ff02::/16,icmp_type=143,icmp_code=0 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,icmp6,reg14=0x1,metadata=0x1,dl_src=00:00:5e:00:01:01,ipv6_src=::,ipv6_dst=ff02::/16,icmp_type=135,icmp_code=0 actions=resubmit(,74)
 table=73, priority=90,icmp6,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,ipv6_src=::,ipv6_dst=ff02::/16,icmp_type=131,icmp_code=0 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,icmp6,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,ipv6_src=::,ipv6_dst=ff02::/16,icmp_type=143,icmp_code=0 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,icmp6,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,ipv6_src=::,ipv6_dst=ff02::/16,icmp_type=135,icmp_code=0 actions=resubmit(,74)
 table=73, priority=90,ip,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.7 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,ip,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,nw_src=192.0.2.100 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,ip,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,nw_src=203.0.113.0/24 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=90,udp,reg14=0x1,metadata=0x1,dl_src=fa:16:3e:00:00:07,nw_src=0.0.0.0,nw_dst=255.255.255.255,tp_src=68,tp_dst=67 actions=load:0->NXM_NX_REG10[12]
 table=73, priority=80,reg14=0x1,metadata=0x1 actions=load:0x1->NXM_NX_REG10[12]
"""  # noqa: E501

OVN_ROUTER = """\
 table=65, priority=100,reg15=0x1,metadata=0x1 actions=output:1
 table=65, priority=100,reg15=0x2,metadata=0x3 actions=clone(ct_clear,set_field:0->reg11,set_field:0->reg12,set_field:0->reg13,set_field:0x2->reg11,set_field:0x4->reg12,set_field:0x2->metadata,set_field:0x2->reg14,set_field:0->reg10,set_field:0->reg15,resubmit(,8))
 table=65, priority=100,reg15=0x2,metadata=0x1 actions=clone(ct_clear,set_field:0->reg11,set_field:0->reg12,set_field:0->reg13,set_field:0x2->reg11,set_field:0x4->reg12,set_field:0x2->metadata,set_field:0x1->reg14,set_field:0->reg10,set_field:0->reg15,resubmit(,8))
 table=65, priority=100,reg15=0x1,metadata=0x2 actions=clone(ct_clear,load:0->NXM_NX_REG11[],load:0->NXM_NX_REG12[],load:0->NXM_NX_REG13[],load:0x7->NXM_NX_REG11[],load:0x5->NXM_NX_REG12[],load:0x1->OXM_OF_METADATA[],load:0x2->NXM_NX_REG14[],load:0->NXM_NX_REG10[],load:0->NXM_NX_REG15[],resubmit(,8))
 table=65, priority=0 actions=drop
 table=12, priority=100,ip,reg10=0/0x1,reg14=0x2,metadata=0x2,nw_dst=198.51.100.7 actions=ct(table=13,zone=NXM_NX_REG11[0..15],nat)
 table=15, priority=100,ip,reg14=0x2,metadata=0x2,nw_dst=198.51.100.7 actions=ct(commit,table=16,zone=NXM_NX_REG11[0..15],nat(dst=192.0.2.7))
 table=45, priority=161,ip,reg15=0x2,metadata=0x2,nw_src=192.0.2.7 actions=set_field:fa:16:3e:00:03:07->eth_src,ct(commit,table=46,zone=NXM_NX_REG11[0..15],nat(src=198.51.100.7))
 table=45, priority=161,ip,reg15=0x2,metadata=0x2,nw_src=192.0.2.6 actions=ct(commit,table=46,zone=NXM_NX_REG12[0..15],nat(src=198.51.100.6))
 table=45, priority=161,ipv6,reg15=0x2,metadata=0x2,ipv6_src=2001:db8::7 actions=mod_dl_src:fa:16:3e:00:03:07,ct(commit,table=46,zone=NXM_NX_REG11[0..15],nat(src=2001:db8:f::7))
 table=45, priority=161,ip,reg15=0x2,metadata=0x2,nw_src=192.0.2.8 actions=set_field:fa:16:3e:00:03:08->eth_src,ct(commit,table=46,zone=NXM_NX_REG11[0..15],nat(src=198.51.100.8))
 table=15, priority=100,ipv6,reg14=0x2,metadata=0x2,ipv6_dst=2001:db8:f::7 actions=ct(commit,table=16,zone=NXM_NX_REG11[0..15],nat(dst=2001:db8::7))
 table=45, priority=25,ip,reg15=0x2,metadata=0x2,nw_src=192.0.2.0/24 actions=ct(commit,table=46,zone=NXM_NX_REG12[0..15],nat(src=198.51.100.1))
 table=26, priority=100,ip,reg0=0x2/0x2002,metadata=0x2 actions=ct(commit,zone=NXM_NX_REG13[0..15],nat(src),exec(set_field:0/0x1->ct_mark)),resubmit(,27)
"""  # noqa: E501
