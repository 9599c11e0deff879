//! Quantities as Kubernetes writes them: `10M`, `1.5Gi`, `1e6` (apimachinery, `resource.Quantity`).

/// Rounded up to a whole number; `None` for what is no quantity, is negative or does not fit.
pub(super) fn whole(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !matches!(c, '0'..='9' | '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (mantissa, exponent) = decimal(number)?;
    let (factor, exponent) = match suffix {
        "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei" => {
            let power = 1 + "KMGTPE".find(&suffix[..1])?;
            (1_u128 << (10 * power), exponent)
        }
        _ => (1, exponent.checked_add(decimal_exponent(suffix)?)?),
    };
    let scaled = mantissa.checked_mul(factor)?;
    let power = 10_u128.checked_pow(exponent.unsigned_abs())?;
    let value = if exponent < 0 { scaled.div_ceil(power) } else { scaled.checked_mul(power)? };
    u64::try_from(value).ok()
}

/// `1.25` as 125 and -2.
fn decimal(number: &str) -> Option<(u128, i32)> {
    let digits = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all = format!("{whole}{fraction}");
    let fits = !all.is_empty() && all.len() < 30 && all.bytes().all(|byte| byte.is_ascii_digit());
    let exponent = i32::try_from(fraction.len()).ok()?;
    fits.then(|| all.parse().ok()).flatten().map(|mantissa| (mantissa, -exponent))
}

fn decimal_exponent(suffix: &str) -> Option<i32> {
    let of_suffix = match suffix {
        "n" => -9,
        "u" => -6,
        "m" => -3,
        "" => 0,
        "k" => 3,
        "M" => 6,
        "G" => 9,
        "T" => 12,
        "P" => 15,
        "E" => 18,
        other => {
            let digits = other.strip_prefix(['e', 'E'])?;
            digits.parse::<i32>().ok().filter(|exponent| exponent.abs() < 30)?
        }
    };
    Some(of_suffix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, expected) in [
            ("0", 0),
            ("1", 1),
            ("10M", 10_000_000),
            ("1Mi", 1_048_576),
            ("1.5Gi", 1_610_612_736),
            ("1k", 1_000),
            (".5k", 500),
            ("1.", 1),
            ("+2", 2),
            ("1e6", 1_000_000),
            ("1E6", 1_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("100e-1", 10),
            ("1500m", 2),
            ("1n", 1),
        ] {
            assert_eq!(whole(text), Some(expected), "{text}");
        }
        for text in ["", "ten", "10MB", "-1", "1.2.3", "1K", "1ki", "9E9E", "99E", "1e99", "M", "1 M", "0x10"]
        {
            assert_eq!(whole(text), None, "{text}");
        }
    }
}
