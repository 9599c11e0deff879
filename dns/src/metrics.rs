//! What dashboards made for CoreDNS ask for, under its names and with its buckets (CoreDNS 1.15: plugins metrics, cache,
//! forward, kubernetes). One server block stands for all: `server="dns://:53"`, `zone="."`.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::forward::Forwarder;
use crate::stats::{Sample, Stats};

/// The labels that every family of a server has.
const SERVER: [(&str, &str); 3] = [("server", "dns://:53"), ("zone", "."), ("view", "")];
/// The one plugin of CoreDNS that asks upstreams.
const FORWARD: (&str, &str) = ("proxy_name", "forward");

/// Reads what is counted whenever somebody asks.
#[derive(Clone)]
pub struct CorednsNames {
    pub(crate) stats: Arc<Stats>,
    pub(crate) forwarder: Arc<Forwarder>,
}

impl fmt::Debug for CorednsNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CorednsNames")
    }
}

impl Collector for CorednsNames {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = [self.requests(), self.sizes_and_times(), self.cache(), self.upstreams()];
        all.iter().flatten().try_for_each(|family| family.encode(&mut encoder))
    }
}

struct Family {
    name: &'static str,
    help: &'static str,
    samples: Vec<(Vec<(&'static str, String)>, Value)>,
}

enum Value {
    Counter(u64),
    Gauge(usize),
    Histogram(Sample),
}

impl Family {
    /// Nothing where there is no sample yet.
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some((_, first)) = self.samples.first() else { return Ok(()) };
        let mut family = encoder.encode_descriptor(self.name, self.help, None, first.kind())?;
        if let [(labels, value)] = self.samples.as_slice()
            && labels.is_empty()
        {
            return value.encode(family);
        }
        self.samples.iter().try_for_each(|(labels, value)| value.encode(family.encode_family(labels)?))
    }
}

impl Value {
    fn kind(&self) -> MetricType {
        match self {
            Self::Counter(_) => MetricType::Counter,
            Self::Gauge(_) => MetricType::Gauge,
            Self::Histogram(_) => MetricType::Histogram,
        }
    }

    fn encode(&self, mut metric: MetricEncoder<'_>) -> fmt::Result {
        match self {
            Self::Counter(count) => ConstCounter::new(*count).encode(metric),
            Self::Gauge(value) => ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX)).encode(metric),
            Self::Histogram(Sample { sum, buckets }) => {
                let count = buckets.iter().map(|(_, count)| count).sum();
                metric.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)
            }
        }
    }
}

/// A sample of the server.
fn of_server(labels: &[(&'static str, &str)], value: Value) -> (Vec<(&'static str, String)>, Value) {
    let all = SERVER.iter().chain(labels);
    (all.map(|(name, text)| (*name, (*text).to_owned())).collect(), value)
}

fn labelled(labels: &[(&'static str, &str)], value: Value) -> (Vec<(&'static str, String)>, Value) {
    (labels.iter().map(|(name, text)| (*name, (*text).to_owned())).collect(), value)
}

impl CorednsNames {
    fn requests(&self) -> Vec<Family> {
        use Value::Counter;
        let asked = self.stats.asked().into_iter().map(|(proto, family, record_type, count)| {
            of_server(&[("proto", proto), ("family", family), ("type", record_type)], Counter(count))
        });
        let said = self.stats.responses();
        let said = said.into_iter().map(|(code, count)| of_server(&[("rcode", code)], Counter(count)));
        vec![
            Family {
                name: "coredns_dns_requests",
                help: "DNS messages that came, by transport, address family and type",
                samples: asked.collect(),
            },
            Family {
                name: "coredns_dns_do_requests",
                help: "DNS messages with the bit DO",
                samples: vec![of_server(&[], Counter(self.stats.asked_for_dnssec()))],
            },
            Family { name: "coredns_dns_responses", help: "DNS answers, by code", samples: said.collect() },
            // A panic ends the agent, and with it this page.
            Family {
                name: "coredns_panics",
                help: "Panics that were survived",
                samples: vec![labelled(&[], Counter(0))],
            },
        ]
    }

    fn sizes_and_times(&self) -> Vec<Family> {
        use Value::Histogram;
        let by_proto = |samples: [(&'static str, Sample); 2]| {
            let each = samples.map(|(proto, sample)| of_server(&[("proto", proto)], Histogram(sample)));
            Vec::from(each)
        };
        vec![
            Family {
                name: "coredns_dns_request_duration_seconds",
                help: "Time from a question to its answer",
                samples: vec![of_server(&[], Histogram(self.stats.durations()))],
            },
            Family {
                name: "coredns_dns_request_size_bytes",
                help: "Octets that the client takes: by EDNS, else 512; 65535 by TCP",
                samples: by_proto(self.stats.request_sizes()),
            },
            Family {
                name: "coredns_dns_response_size_bytes",
                help: "Octets of answers",
                samples: by_proto(self.stats.response_sizes()),
            },
            Family {
                name: "coredns_kubernetes_dns_programming_duration_seconds",
                help: "Time from the change of a headless Service's endpoints to their being served",
                samples: vec![labelled(
                    &[("service_kind", "headless_with_selector")],
                    Histogram(self.stats.programming()),
                )],
            },
        ]
    }

    fn cache(&self) -> Vec<Family> {
        let (success, denial) = self.forwarder.kept();
        let by_type = |[success, denial]: [Value; 2]| {
            vec![of_server(&[("type", "success")], success), of_server(&[("type", "denial")], denial)]
        };
        let stats = &self.stats;
        let hits = stats.hits();
        let alone =
            |name, help, count| Family { name, help, samples: vec![of_server(&[], Value::Counter(count))] };
        vec![
            Family {
                name: "coredns_cache_entries",
                help: "Answers of upstreams that are kept",
                samples: by_type([success, denial].map(Value::Gauge)),
            },
            Family {
                name: "coredns_cache_hits",
                help: "Answers from the cache of upstreams' answers",
                samples: by_type(hits.map(Value::Counter)),
            },
            alone("coredns_cache_misses", "Questions that the cache had no answer to", stats.misses()),
            alone(
                "coredns_cache_requests",
                "Questions that upstreams' answers are for",
                stats.misses() + hits[0] + hits[1],
            ),
            alone("coredns_cache_served_stale", "Answers given past their time", stats.served_stale()),
            alone("coredns_cache_prefetch", "Answers fetched anew before they ended", stats.prefetched()),
            alone(
                "coredns_cache_evictions",
                "Answers that gave others their place",
                self.forwarder.evicted(),
            ),
        ]
    }

    fn upstreams(&self) -> Vec<Family> {
        let upstreams = self.stats.upstreams();
        let (mut durations, mut requests, mut responses) = (Vec::new(), Vec::new(), Vec::new());
        for (to, codes) in &upstreams.answers {
            let mut of_all = 0;
            for (code, sample) in codes {
                let count = sample.count();
                of_all += count;
                responses.push(labelled(&[("to", to), ("rcode", code)], Value::Counter(count)));
                let labels = [FORWARD, ("to", to), ("rcode", code)];
                durations.push(labelled(&labels, Value::Histogram(sample.clone())));
            }
            requests.push(labelled(&[("to", to)], Value::Counter(of_all)));
        }
        let silent = upstreams.silent.iter();
        let silent = silent.map(|(to, count)| labelled(&[FORWARD, ("to", to)], Value::Counter(*count)));
        vec![
            Family {
                name: "coredns_proxy_request_duration_seconds",
                help: "Time that an upstream took to answer",
                samples: durations,
            },
            Family {
                name: "coredns_proxy_healthcheck_failures",
                help: "Questions that an upstream did not answer",
                samples: silent.collect(),
            },
            Family {
                name: "coredns_forward_requests",
                help: "Questions that an upstream answered",
                samples: requests,
            },
            Family {
                name: "coredns_forward_responses",
                help: "Answers of an upstream, by code",
                samples: responses,
            },
            Family {
                name: "coredns_forward_max_concurrent_rejects",
                help: "Questions refused because too many were under way",
                samples: vec![labelled(&[], Value::Counter(self.stats.rejected()))],
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::stats::{Came, Protocol};

    #[test]
    fn the_page_has_coredns_names_labels_and_buckets() {
        let stats = Arc::new(Stats::default());
        let came = Came {
            protocol: Protocol::Udp,
            ipv6: false,
            record_type: Some(28),
            dnssec_ok: true,
            takes_bytes: 1232,
        };
        stats.count_asked(&came, 1);
        stats.count_sent(Protocol::Udp, 93, 1);
        stats.count_duration(std::time::Duration::from_micros(300), 1);
        stats.count_upstream("192.0.2.1:53", Some(3), std::time::Duration::from_millis(4));
        stats.count_upstream("192.0.2.1:53", None, std::time::Duration::from_secs(2));
        let forwarder = Arc::new(Forwarder::new("/nonexistent/resolv.conf".into(), None, stats.clone()));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(CorednsNames { stats, forwarder }));
        let mut page = String::new();
        text::encode(&mut page, &registry).unwrap();
        for line in [
            "coredns_dns_requests_total{server=\"dns://:53\",zone=\".\",view=\"\",proto=\"udp\",family=\"1\",type=\"AAAA\"} 1",
            "coredns_dns_do_requests_total{server=\"dns://:53\",zone=\".\",view=\"\"} 1",
            "coredns_dns_request_duration_seconds_bucket{le=\"0.0005\",server=\"dns://:53\",zone=\".\",view=\"\"} 1",
            "coredns_dns_response_size_bytes_bucket{le=\"100.0\",server=\"dns://:53\",zone=\".\",view=\"\",proto=\"udp\"} 1",
            "coredns_dns_request_size_bytes_bucket{le=\"2047.0\",server=\"dns://:53\",zone=\".\",view=\"\",proto=\"udp\"} 1",
            "coredns_cache_entries{server=\"dns://:53\",zone=\".\",view=\"\",type=\"denial\"} 0",
            "coredns_proxy_request_duration_seconds_bucket{le=\"0.004\",proxy_name=\"forward\",to=\"192.0.2.1:53\",rcode=\"NXDOMAIN\"} 1",
            "coredns_proxy_healthcheck_failures_total{proxy_name=\"forward\",to=\"192.0.2.1:53\"} 1",
            "coredns_forward_responses_total{to=\"192.0.2.1:53\",rcode=\"NXDOMAIN\"} 1",
            "coredns_kubernetes_dns_programming_duration_seconds_count{service_kind=\"headless_with_selector\"} 0",
            "coredns_panics_total 0",
        ] {
            assert!(page.lines().any(|said| said == line), "{line}\n{page}");
        }
        assert!(
            page.contains("coredns_dns_requests_total") && !page.contains("type=\"MX\""),
            "what was never asked is not told"
        );
    }
}
