//! The maximum transmission unit of a connection.

use crate::{Connection, Element, Error, Next, RequestCall};

/// Sets the MTU of each request (bytes); zero leaves it alone.
#[derive(Clone, Copy, Debug)]
pub struct Mtu(pub u32);

#[async_trait::async_trait]
impl Element for Mtu {
    fn name(&self) -> &'static str {
        "mtu"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let context = call.connection_mut().context.get_or_insert_default();
        if self.0 > 0 {
            context.mtu = self.0;
        }
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chain, Context, core::testing::request_id};

    #[tokio::test]
    async fn is_set() {
        for (own, asked, result) in [(1450, 0, 1450), (1450, 9000, 1450), (0, 9000, 9000)] {
            let mut call = request_id("c", Context::new());
            call.connection_mut().context.get_or_insert_default().mtu = asked;
            let connection = Chain::builder().element(Mtu(own)).build().request(call).await.unwrap();
            assert_eq!(connection.context.unwrap().mtu, result);
        }
    }
}
