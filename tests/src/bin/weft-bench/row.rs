//! One figure, as JSON and as a line of a table.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    Higher,
    Lower,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    name: String,
    unit: String,
    weft: f64,
    peer: Option<f64>,
    peer_name: Option<String>,
    /// weft / peer.
    ratio: Option<f64>,
    better: Better,
    /// Of the ratio where there is a peer, else of Weft's own figure.
    target: Option<f64>,
    met: Option<bool>,
}

impl Row {
    /// A figure without a peer, and perhaps without a target.
    pub(crate) fn alone(
        name: &str,
        unit: &str,
        weft: f64,
        better: Better,
        target: impl Into<Option<f64>>,
    ) -> Self {
        let target = target.into();
        Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            weft,
            peer: None,
            peer_name: None,
            ratio: None,
            better,
            target,
            met: target.map(|target| better.holds(weft, target)),
        }
    }

    /// A figure beside a peer's; `target` is of the ratio.
    pub(crate) fn beside(
        name: &str,
        unit: &str,
        weft: f64,
        (peer_name, peer): (&str, f64),
        better: Better,
        target: f64,
    ) -> Self {
        let ratio = weft / peer;
        Self {
            peer: Some(peer),
            peer_name: Some(peer_name.to_owned()),
            ratio: Some(ratio),
            met: Some(better.holds(ratio, target)),
            ..Self::alone(name, unit, weft, better, target)
        }
    }
}

impl Row {
    /// A figure beside one that a peer's documentation gives; `target` is of Weft's own figure.
    pub(crate) fn documented(name: &str, unit: &str, weft: f64, peer: (&str, f64), target: f64) -> Self {
        Self::bounded(name, unit, weft, peer, Better::Lower, target)
    }

    /// A figure beside a peer's; `target`, where there is one, is of Weft's own figure.
    pub(crate) fn bounded(
        name: &str,
        unit: &str,
        weft: f64,
        (peer_name, peer): (&str, f64),
        better: Better,
        target: impl Into<Option<f64>>,
    ) -> Self {
        Self {
            peer: Some(peer),
            peer_name: Some(peer_name.to_owned()),
            ratio: Some(weft / peer),
            ..Self::alone(name, unit, weft, better, target)
        }
    }
}

impl Better {
    fn holds(self, figure: f64, target: f64) -> bool {
        match self {
            Self::Higher => figure >= target,
            Self::Lower => figure <= target,
        }
    }
}

pub(crate) fn table(area: &str, rows: &[Row]) -> String {
    let mut text = format!("{area}\n");
    for row in rows {
        let peer = match (&row.peer_name, row.peer, row.ratio) {
            (Some(name), Some(peer), Some(ratio)) => format!("{name} {peer:.2}, ratio {ratio:.2}"),
            _ => String::new(),
        };
        let sign = if row.better == Better::Higher { ">=" } else { "<=" };
        let target = row.target.map_or(String::new(), |target| format!("target {sign} {target}"));
        let met = match row.met {
            Some(true) => "met",
            Some(false) => "NOT MET",
            None => "",
        };
        let _ = writeln!(
            text,
            "  {:<44} {:>10.2} {:<7} {peer:<34} {target:<16} {met}",
            row.name, row.weft, row.unit
        );
    }
    text
}

/// The middle of the samples; the mean of the two middle ones for an even count. NaN when there are none.
pub(crate) fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    match samples.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => samples[n / 2],
        n => f64::midpoint(samples[n / 2 - 1], samples[n / 2]),
    }
}

/// The sample that `percent` of them do not exceed (nearest rank). NaN when there are none.
pub(crate) fn percentile(mut samples: Vec<f64>, percent: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * samples.len() as f64).ceil() as usize;
    samples.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_sample_of_that_rank() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(hundred.clone(), 99.0), 99.0);
        assert_eq!(percentile(hundred.clone(), 50.0), 50.0);
        assert_eq!(percentile(hundred, 100.0), 100.0);
        assert_eq!(percentile(vec![7.0], 99.0), 7.0);
        assert!(percentile(Vec::new(), 50.0).is_nan());
    }
}
